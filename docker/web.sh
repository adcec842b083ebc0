#!/bin/sh
# The chat page of a container. The environment says which model: MODEL_SOURCE (base, mid, sft or rl), MODEL_TAG (such as
# d20) and MODEL_STEP; where one is empty, scripts.serve chooses. Arguments are flags of scripts.serve.
set -eu
[ -z "${MODEL_STEP:-}" ] || set -- --step "$MODEL_STEP" "$@"
[ -z "${MODEL_TAG:-}" ] || set -- --model-tag "$MODEL_TAG" "$@"
[ -z "${MODEL_SOURCE:-}" ] || set -- --source "$MODEL_SOURCE" "$@"
# Inside of a container the loopback address is reached by nobody; what is published to whom, `docker run -p` decides.
exec python -m scripts.serve --host 0.0.0.0 --port 8000 "$@"

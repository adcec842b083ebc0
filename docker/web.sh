#!/bin/sh
# Entry point of the chat page's container. The environment chooses the model: MODEL_SOURCE (base, mid, sft or rl),
# MODEL_TAG (such as d20) and MODEL_STEP; empty ones default as in scripts.serve. Arguments are flags of scripts.serve.
set -eu
[ -z "${MODEL_STEP:-}" ] || set -- --step "$MODEL_STEP" "$@"
[ -z "${MODEL_TAG:-}" ] || set -- --model-tag "$MODEL_TAG" "$@"
[ -z "${MODEL_SOURCE:-}" ] || set -- --source "$MODEL_SOURCE" "$@"
# A container's loopback address cannot be reached from outside; `docker run -p` decides who can reach the page.
exec python -m scripts.serve --host 0.0.0.0 --port 8000 "$@"

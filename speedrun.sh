#!/usr/bin/env bash
# The whole pipeline, from raw text to a model you can chat with, on the devices of this machine. Installs what it needs
# into `.venv` first; a second run continues where the first one stopped. Flags: `bash speedrun.sh --help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh
setup_env
exec .venv/bin/python -m scripts.speedrun "$@"

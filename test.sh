#!/usr/bin/env bash
# All tests, on the CPU; arguments go to pytest. Installs what it needs into `.venv` first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh
setup_env offline dev
exec .venv/bin/python -m pytest -q "$@"

#!/usr/bin/env bash
# All tests, on the CPU, in a process per core (-n 0: in one); arguments go to pytest. Installs what it needs into `.venv`
# first. The tests against the real torch and transformers run where those are installed: NANOCHAT_TEST_EXTRAS=torch
# brings them (4 GB).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh
setup_env offline dev ${NANOCHAT_TEST_EXTRAS:+"$NANOCHAT_TEST_EXTRAS"}
exec .venv/bin/python -m pytest -q -n auto --dist loadfile "$@"

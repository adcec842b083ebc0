#!/usr/bin/env bash
# The tests, on the CPU, in a process per core (-n 0: in one); arguments go to pytest. Installs what it needs into `.venv`
# first. Tests marked slow take minutes: --slow runs them too, `-m slow` only them. The tests against the real torch and
# transformers run where those are installed: NANOCHAT_TEST_EXTRAS=torch installs them (4 GB).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh
setup_env offline dev ${NANOCHAT_TEST_EXTRAS:+"$NANOCHAT_TEST_EXTRAS"}
selected=(-m "not slow")
arguments=()
for argument in "$@"; do
    case $argument in
        --slow) selected=() ;;
        -m* | *::*) selected=() arguments+=("$argument") ;;
        *) arguments+=("$argument") ;;
    esac
done
exec .venv/bin/python -m pytest -q -n auto --dist loadfile ${selected[@]+"${selected[@]}"} ${arguments[@]+"${arguments[@]}"}

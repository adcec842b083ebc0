#!/usr/bin/env bash
# Measures one NVIDIA GPU in at most nine minutes: checks, training, decoding, float8. Needs Python with jax (CUDA),
# flax, optax, numpy, rich and pyyaml, and no network. Flags are those of benchmarks/gpu/__main__.py; see --help.
#   bash benchmarks/gpu.sh --out results
#   PYTHON=/opt/venv/bin/python bash benchmarks/gpu.sh --phases device,attention
#   bash benchmarks/gpu.sh --tiny                   rehearsal, also on a CPU
set -euo pipefail
start=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
if [[ -z "$python" ]]; then
    if [[ -x .venv/bin/python ]]; then python=$PWD/.venv/bin/python; else python=python3; fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
cd "$start"
exec "$python" -u -m benchmarks.gpu "$@"

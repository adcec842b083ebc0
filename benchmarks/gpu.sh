#!/usr/bin/env bash
# Measures one GPU: attention against its reference, training and decoding. Needs jax with CUDA, flax and optax, no
# network, no installation; with torch it measures that too. Flags go to gpu.py.
#   bash benchmarks/gpu.sh
#   PYTHON=/opt/venv/bin/python bash benchmarks/gpu.sh --depths 12 --out result.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
if [[ -z "$python" ]]; then
    if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python3; fi
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" benchmarks/gpu.py "$@"

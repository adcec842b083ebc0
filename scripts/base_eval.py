"""Evaluate a base model: CORE, bits per byte, and samples.

python -m scripts.base_eval
python -m scripts.base_eval --eval core,bpb,sample --max-per-task 100
python -m scripts.base_eval --eval core --hf-path ~/models/gpt2
"""

from nanochat_jax import cli
from nanochat_jax.eval.base_model import BaseEvalConfig, evaluate_base

if __name__ == "__main__":
    cli.run(evaluate_base, BaseEvalConfig, prog="scripts.base_eval", description=__doc__)

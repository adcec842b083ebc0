"""How fast are evaluations? CORE and generated answers, against one at a time with what a user would run instead.

    NANOCHAT_TEST_DATA=DIR python benchmarks/eval.py [--max-per-task 60] [--every 6]

CORE: the reference checkpoint of 2025 on the reference bundle. Ours in whole, compilation included and apart; the same
weights in transformers' PyTorch, eager, one example at a time (its choices as one batch, as nanochat evaluates), on
every n-th example of each task. Generation: the answers to arithmetic problems through the engine with all of them in
flight, against one request at a time through the same engine, and through transformers' generate; the reference
checkpoint never ends its answers, so all are equally long. Needs the extra `torch`. Prints a table, then one JSON line.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import torch

from nanochat_jax.chat import render_for_completion
from nanochat_jax.eval.chat import Generator, Sampling
from nanochat_jax.eval.core import evaluate_core, read_items, read_tasks, tokenize_task
from nanochat_jax.eval.hf_model import HFModel
from nanochat_jax.eval.scoring import Scorer
from nanochat_jax.interop.hf import write_hf
from nanochat_jax.paths import Paths
from nanochat_jax.pretrained import read_pretrained
from nanochat_jax.startup import start
from nanochat_jax.tasks.skills import Arithmetic

NEW_TOKENS = 48


def seconds(run, *args) -> float:
    began = time.perf_counter()
    run(*args)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-per-task", type=int, default=60)
    parser.add_argument("--every", type=int, default=12, help="one at a time, evaluate only every n-th example")
    parser.add_argument("--rows", type=int, default=4, help="examples of a batch of ours")
    parser.add_argument("--problems", type=int, default=128, help="answers to generate")
    given = parser.parse_args()
    if not os.environ.get("NANOCHAT_TEST_DATA"):
        print("error: NANOCHAT_TEST_DATA is not set: it names the folder with the checkpoint and the bundle", file=sys.stderr)
        return 2
    reference = Path(os.environ["NANOCHAT_TEST_DATA"])
    bundle = reference / "data" / "eval_bundle"
    with tempfile.TemporaryDirectory() as scratch:
        start(Paths(Path(scratch)), compile_cache=False)
        model = read_pretrained(reference / "golden" / "trained-classic")
        write_hf(Path(scratch) / "hf", model)
        theirs = HFModel(Path(scratch) / "hf", tokens=1)
    print(model)
    return 0


if __name__ == "__main__":
    sys.exit(main())

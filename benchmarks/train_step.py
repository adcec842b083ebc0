"""Training tokens/s on this machine's CPU, compared to PyTorch.

    python benchmarks/train_step.py                 d4, 512 tokens, vocabulary 8,192
    python benchmarks/train_step.py --depth 8 --sequence 2048 --vocab 65536 --dtype bfloat16
    python benchmarks/train_step.py --loop          overhead of the loop over the step
    python benchmarks/train_step.py --first-step    seconds to the first step of d12, twice

Model, weights, batch and optimizer are the same. Contenders are separate processes and take turns;
the fastest round of each counts. The losses of the first steps must agree. Prints a table, then one
JSON line. Needs the extra `torch`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contender import Contender

# otherwise torch's idle threads use the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
CHECKED_STEPS = 3
TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2}


def make_batch(options: argparse.Namespace) -> Any:
    import numpy as np

    shape = (options.batch, options.sequence + 1)
    tokens = np.random.default_rng(0).zipf(1.3, shape).astype(np.int64) % options.vocab
    return tokens[:, :-1], tokens[:, 1:]


def jax_parts(options: argparse.Namespace) -> tuple:
    """The package's step, its state and its batch shape, on one device."""

    from nanochat_jax.devices import start
    from nanochat_jax.model.compute import Compute
    from nanochat_jax.model.config import GPTConfig
    from nanochat_jax.model.sharding import make_mesh
    from nanochat_jax.paths import Paths
    from nanochat_jax.train.optim import (
        CLASSIC_RATES,
        OptimizerConfig,
        Schedules,
        constant,
        make_optimizer,
    )
    from nanochat_jax.train.step import batch_shape, init_state, make_train_step

    scratch = Paths(Path(tempfile.gettempdir()) / "nanochat_jax-benchmark")
    scratch.base.mkdir(exist_ok=True)
    start(scratch)
    model = GPTConfig.classic(
        options.depth, sequence_len=options.sequence, vocab_size=options.vocab
    )
    mesh = make_mesh("1x1")
    rates = OptimizerConfig(**(CLASSIC_RATES | {"grad_clip": 0.0}))
    compute = Compute.on(mesh, dtype=options.dtype)
    schedules = Schedules(lr_multiplier=constant(1.0), momentum=constant(0.95))
    optimizer = make_optimizer(model, rates, schedules, compute)
    state, shardings = init_state(model, optimizer, mesh, fsdp=False, seed=0)
    step = make_train_step(model, optimizer, compute, shardings)
    shape = batch_shape(options.batch * options.sequence, options.batch, options.sequence, mesh)
    return model, mesh, state, shardings, step, shape


def jax_worker(options: argparse.Namespace) -> Any:
    import numpy as np

    from nanochat_jax.model.loss import Batch
    from nanochat_jax.train.memory import compile_step
    from nanochat_jax.train.step import shard_batch

    _, mesh, state, _, step, shape = jax_parts(options)
    compiled, _ = compile_step(step, state, shape, mesh)
    batch = shard_batch(
        Batch(*(array.astype(np.int32) for array in make_batch(options))), shape, mesh
    )

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics["loss"])

    return run


def torch_worker(options: argparse.Namespace, compiled: bool) -> Any:
    import jax
    import numpy as np
    import torch
    from torch_reference import GPT, Trainer

    jax.config.update("jax_platforms", "cpu")
    config, _, state, *_ = jax_parts(options)
    params = jax.tree.map(np.array, state.params)
    model = GPT(
        depth=config.n_layer,
        num_heads=config.n_head,
        width=config.n_embd,
        vocab_size=config.vocab_size,
        sequence_len=options.sequence,
    )
    model.load(params)
    del state, params
    trainer = Trainer(model, dtype=getattr(torch, options.dtype), compiled=compiled)
    batch = [torch.from_numpy(array.copy()) for array in make_batch(options)]
    return lambda: trainer.step(*batch)


def worker(name: str, options: argparse.Namespace) -> None:
    """Answer numbers of steps on standard input with the seconds and losses of those steps."""
    run = (
        jax_worker(options)
        if name == "jax"
        else torch_worker(options, compiled=name == "torch.compile")
    )
    for line in sys.stdin:
        began = time.perf_counter()
        losses = [run() for _ in range(int(line))]
        print(json.dumps({"seconds": time.perf_counter() - began, "losses": losses}), flush=True)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    contenders = {name: Contender(name) for name in options.against.split(",")}
    # also compiles
    first = {name: contender.ask(CHECKED_STEPS)["losses"] for name, contender in contenders.items()}
    for losses in first.values():
        for mine, theirs in zip(first["jax"], losses, strict=True):
            if abs(mine - theirs) > TOLERANCE[options.dtype] * mine:
                sys.exit(f"the losses differ, so the contenders do not compute the same: {first}")
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(options.rounds):
        for name, contender in contenders.items():
            best[name] = min(best[name], contender.ask(options.steps)["seconds"] / options.steps)
    for contender in contenders.values():
        contender.close()
    tokens = options.batch * options.sequence
    rates = {name: tokens / seconds for name, seconds in best.items()}
    print(
        f"d{options.depth}, {options.batch} x {options.sequence} tokens, vocabulary "
        f"{options.vocab:,}, {options.dtype}, "
        f"{os.cpu_count()} cores; the step alone, without compilation, data and evaluation; best "
        f"of {options.rounds} rounds"
    )
    for name, rate in rates.items():
        print(
            f"  {name:14s} {rate:9,.0f} tokens/s  {1000 * tokens / rate:8.0f} ms  ours is "
            f"{rates['jax'] / rate:.2f}x"
        )
    return {
        "tokens_per_sec": rates,
        "ratio": {name: rates["jax"] / rate for name, rate in rates.items() if name != "jax"},
    }


def measure_loop(options: argparse.Namespace) -> dict[str, Any]:
    """Time of a step in the loop (batches, logging, display) relative to the step itself.

    The two alternate.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nanochat_jax.model.loss import Batch
    from nanochat_jax.train.config import TrainConfig
    from nanochat_jax.train.job import Evaluation, Job, LoaderSource
    from nanochat_jax.train.loop import train
    from nanochat_jax.train.memory import compile_step
    from nanochat_jax.train.optim import constant
    from nanochat_jax.train.step import shard_batch

    model, mesh, state, shardings, step, shape = jax_parts(options)
    host = dict(
        zip(
            ("inputs", "targets"),
            (array.astype(np.int32) for array in make_batch(options)),
            strict=True,
        )
    )

    class Batches:
        def __next__(self) -> dict[str, np.ndarray]:
            return host

        position: dict[str, Any] = {}

        def get_state(self) -> dict[str, Any]:
            return {}

    compiled, _ = compile_step(step, state, shape, mesh)
    best = {"bare": float("inf"), "loop": float("inf")}
    for _ in range(options.rounds):
        batch = shard_batch(Batch(**host), shape, mesh)
        # both donate their state
        mine, given = (jax.tree.map(jnp.copy, state) for _ in range(2))
        began = time.perf_counter()
        for _ in range(options.steps):
            mine, metrics = compiled(mine, batch)
        float(metrics["loss"])
        best["bare"] = min(best["bare"], (time.perf_counter() - began) / options.steps)
        with tempfile.TemporaryDirectory() as directory:
            job = Job(
                name="loop",
                config=TrainConfig(save_every=0),
                model=model,
                directory=Path(directory) / "d",
                logs=Path(directory) / "d",
                num_steps=options.steps,
                shape=shape,
                lr_multiplier=constant(1.0),
                metadata={},
                dry_run=True,
                evaluations=[Evaluation(-1, lambda params: {"val_bpb": 0.0})],
            )
            outcome = train(job, given, shardings, step, LoaderSource(Batches(), shape, mesh))
            best["loop"] = min(best["loop"], outcome.seconds / options.steps)
    overhead = best["loop"] / best["bare"] - 1.0
    print(
        f"d{options.depth}: bare step {1000 * best['bare']:.2f} ms, in the loop "
        f"{1000 * best['loop']:.2f} ms: "
        f"{100 * overhead:+.2f}%"
    )
    return {"seconds": best, "overhead": overhead}


def measure_first_step(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from Python's start to the end of the first step, with a cold and a warm cache."""
    command = [
        sys.executable,
        __file__,
        *sys.argv[1:],
        "--depth",
        "12",
        "--batch",
        "1",
        "--worker",
        "jax",
    ]
    seconds = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("cold", "warm"):
            began = time.perf_counter()
            subprocess.run(
                command,
                input="1\n",
                text=True,
                check=True,
                capture_output=True,
                env=os.environ | {"TMPDIR": scratch},
            )
            seconds[name] = time.perf_counter() - began
            print(f"d12: first step after {seconds[name]:.1f} s with a {name} compile cache")
    return {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument(
        "--batch", type=int, help="rows; default 4,096 tokens, half of it with a large vocabulary"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument(
        "--against",
        default="jax,torch.compile",
        help="contenders: jax and any of torch.compile, torch",
    )
    parser.add_argument("--loop", action="store_true")
    parser.add_argument("--first-step", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batch is None:
        options.batch = max(1, (2048 if options.vocab > 32768 else 4096) // options.sequence)
    if options.worker:
        return worker(options.worker, options)
    measure = (
        measure_loop if options.loop else measure_first_step if options.first_step else compare
    )
    print(json.dumps({"benchmark": "train_step", **vars(options), **measure(options)}))


if __name__ == "__main__":
    main()

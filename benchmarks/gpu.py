"""One accelerator: attention kernels against the reference, training tokens/s and MFU, decoding tokens/s and MBU.

    bash benchmarks/gpu.sh
    python benchmarks/gpu.py --depths 2 --sequence 128 --batches 1 --decode-batches 1 --vocab 512     a minute on a CPU

Training runs the classic model, which torch_reference.py has too, at each batch; the fastest counts. Tokens are random:
no data loading is timed, and compilation is not. Prints tables, then one JSON line.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROUNDS = 3


def check_attention(dtype: Any, sequence: int) -> dict[str, float]:
    """Largest error of outputs and gradients of the kernel that training picks, relative to the reference in float32."""
    import jax
    import jax.numpy as jnp

    from nanochat_jax.model.attention import causal_attention
    from nanochat_jax.model.kernels import choose_attention
    from nanochat_jax.model.sharding import make_mesh

    attend = choose_attention("auto", mesh=make_mesh("1x1"), dtype=dtype, length=sequence, head_dim=128)
    name = getattr(attend, "func", attend).__name__
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (jax.random.normal(key, (2, sequence, 4, 128), dtype) for key in keys)
    errors = {}
    for window in (None, sequence // 4):
        def both(f: Any, dtype: Any) -> Any:
            def run(q, k, v, cotangent):  # arguments, not constants, which the compiler would compute with
                out, backward = jax.vjp(lambda *qkv: f(*qkv, window=window), q, k, v)  # noqa: B023
                return out, *backward(cotangent)

            return jax.jit(run)(*(each.astype(dtype) for each in (q, k, v, cotangent)))

        expected, found = both(causal_attention, jnp.float32), both(attend, dtype)
        error = max(float(jnp.abs(b.astype(jnp.float32) - a).max() / jnp.abs(a).max())
                    for a, b in zip(expected, found, strict=True))
        errors[f"{name}, window {window}"] = error
    return errors


def timed(run: Any, steps: int) -> float:
    """Seconds of one call, the fastest of some rounds. `run` waits for its result."""
    run()
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(steps):
            run()
        best = min(best, (time.perf_counter() - began) / steps)
    return best


def tokens(batch: int, sequence: int, vocab: int) -> Any:
    import numpy as np

    rows = np.random.default_rng(0).integers(0, vocab, (batch, sequence + 1), dtype=np.int32)
    return rows[:, :-1], rows[:, 1:]


def train_jax(options: argparse.Namespace) -> float:
    """Seconds of a step of `options.batch` rows."""
    import jax

    from nanochat_jax.model.config import GPTConfig
    from nanochat_jax.model.sharding import make_mesh
    from nanochat_jax.train.optim import CLASSIC_RATES, OptimizerConfig, constant, make_optimizer
    from nanochat_jax.train.step import batch_shape, compile_step, init_state, make_train_step, place_batch, resolve_dtype

    model = GPTConfig.classic(options.depth, sequence_len=options.sequence, vocab_size=options.vocab)
    mesh, dtype = make_mesh("1x1"), resolve_dtype("auto")
    optimizer = make_optimizer(model, OptimizerConfig(**(CLASSIC_RATES | {"grad_clip": 0.0})), lr_multiplier=constant(1.0),
                               momentum=constant(0.95), muon_dtype=dtype, mesh=mesh)
    state, shardings = init_state(model, optimizer, mesh, fsdp=False, seed=0)
    shape = batch_shape(options.batch * options.sequence, options.batch, options.sequence, mesh)
    step, _ = compile_step(make_train_step(model, optimizer, dtype=dtype, mesh=mesh, shardings=shardings), state, shape, mesh)
    batch = [place_batch(array, shape, mesh) for array in tokens(options.batch, options.sequence, options.vocab)]

    def run() -> None:
        nonlocal state
        state, metrics = step(state, *batch)
        jax.block_until_ready(metrics)

    return timed(run, options.steps)


def train_torch(options: argparse.Namespace) -> float:
    import torch
    from torch_reference import GPT, Trainer

    width, device = 64 * options.depth, "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    model = GPT(depth=options.depth, num_heads=-(-width // 128), width=width, vocab_size=options.vocab,
                sequence_len=options.sequence)
    trainer = Trainer(model.to(device), dtype=torch.bfloat16 if device == "cuda" else torch.float32, compiled=True)
    batch = [torch.from_numpy(array).long().to(device) for array in tokens(options.batch, options.sequence, options.vocab)]
    return timed(lambda: trainer.step(*batch), options.steps)


def decode_jax(options: argparse.Namespace) -> float:
    """Seconds of decoding one token for each of `options.batch` sequences, 32 tokens a dispatch, over a full-length cache."""
    import jax
    from nanochat_jax.infer.device import Program

    from nanochat_jax.infer import device
    from nanochat_jax.model.config import GPTConfig
    from nanochat_jax.model.weights import init_params
    from nanochat_jax.train.step import resolve_dtype

    model = GPTConfig.modern(options.depth, sequence_len=options.sequence, vocab_size=options.vocab)
    dtype, steps, batch = resolve_dtype("auto"), 32, options.batch
    params = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype), init_params(model, key)))(jax.random.key(0))
    params = device.split_layers(params, config=model)
    program = Program(model, dtype, shortest=1, pause=options.vocab, mesh=None)  # an id that no token has
    slots = device.new_slots(rows=batch, length=options.sequence, program=program)
    dispatch = device.greedy_dispatch(batch, length=0, steps=steps)

    def run() -> None:
        nonlocal slots
        slots, emitted, _ = device.decode(params, slots, dispatch, program=program)
        jax.block_until_ready(emitted)

    return timed(run, max(1, options.steps // 4)) / steps


WORKERS = {"jax": train_jax, "torch.compile": train_torch, "decode": decode_jax}


def measure(name: str, options: argparse.Namespace, **shape: int) -> float | None:
    """Seconds, from a process of its own, so that no two share the device's memory; None if it does not fit."""
    flags = [f"--{key}={value}" for key, value in {"sequence": options.sequence, "vocab": options.vocab, "steps": options.steps,
                                                   **shape}.items()]
    done = subprocess.run([sys.executable, __file__, "--worker", name, *flags], capture_output=True, text=True)
    if done.returncode == 0:
        return float(done.stdout.splitlines()[-1])
    if any(word in done.stderr for word in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")):
        return None
    raise SystemExit(f"{name} {shape} failed:\n{done.stderr[-2000:]}")


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What this process may ask the device for; in a process of its own too, since it takes the device's memory."""
    import jax

    from nanochat_jax.metrics import peak_bandwidth, peak_flops
    from nanochat_jax.train.step import resolve_dtype

    chip = jax.devices()[0]
    return {"device": chip.device_kind, "platform": chip.platform, "jax": jax.__version__, "dtype": str(resolve_dtype("auto")),
            "peak_flops": peak_flops(chip), "bandwidth": peak_bandwidth(chip),
            "attention_error": check_attention(resolve_dtype("auto"), options.sequence)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--depths", type=numbers, default=[12, 16, 20])
    parser.add_argument("--batches", type=numbers, default=[4, 8, 16, 32, 64], help="rows of a training step")
    parser.add_argument("--decode-batches", type=numbers, default=[1, 8, 32, 128])
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--worker", choices=[*WORKERS, "describe"], help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(describe(options)) if options.worker == "describe" else WORKERS[options.worker](options))
        return

    from nanochat_jax.model.config import GPTConfig

    described = subprocess.run([sys.executable, __file__, "--worker", "describe", "--sequence", str(options.sequence)],
                               stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(described.splitlines()[-1])
    print(f"{result['device']}, jax {result['jax']}, {result['dtype']}, {options.sequence} tokens a row")
    for name, error in result["attention_error"].items():
        print(f"  {name}: largest error {error:.1e}")
    limit = 2e-2 if result["dtype"] == "bfloat16" else 1e-4
    if max(result["attention_error"].values()) > limit:
        raise SystemExit(f"the attention kernel is wrong: its error is above {limit}")

    contenders = ["jax"] + (["torch.compile"] if importlib.util.find_spec("torch") else [])
    result["train"], result["decode"] = [], []
    for depth in options.depths:
        flops = flops_per_token(GPTConfig.classic(depth, sequence_len=options.sequence, vocab_size=options.vocab))
        for name in contenders:
            for batch in options.batches:
                seconds = measure(name, options, depth=depth, batch=batch)
                if seconds is None:
                    print(f"  d{depth} {name:13} batch {batch:3}: does not fit")
                    break
                rate = batch * options.sequence / seconds
                mfu = rate * flops / result["peak_flops"] if result["peak_flops"] else None
                print(f"  d{depth} {name:13} batch {batch:3}: {rate:12,.0f} tokens/s, MFU "
                      f"{'n/a' if mfu is None else f'{100 * mfu:.1f}%'}")
                result["train"].append({"depth": depth, "contender": name, "batch": batch, "tokens_per_sec": rate, "mfu": mfu})
    for depth in options.depths:
        model = GPTConfig.modern(depth, sequence_len=options.sequence, vocab_size=options.vocab)
        width = 2 if result["dtype"] == "bfloat16" else 4
        for batch in options.decode_batches:
            seconds = measure("decode", options, depth=depth, batch=batch)
            if seconds is None:
                break
            # Read once a token: the matrices, and the caches; of the tables only a row.
            moved = width * (num_scaling_params(model) + 2 * batch * options.sequence * model.n_kv_head * model.head_dim * depth)
            mbu = moved / seconds / result["bandwidth"] if result["bandwidth"] else None
            print(f"  d{depth} decode, batch {batch:3}: {batch / seconds:12,.0f} tokens/s, MBU "
                  f"{'n/a' if mbu is None else f'{100 * mbu:.1f}%'}")
            result["decode"].append({"depth": depth, "batch": batch, "tokens_per_sec": batch / seconds, "mbu": mbu})
    text = json.dumps(result)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

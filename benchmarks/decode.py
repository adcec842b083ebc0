"""Decoding tokens/s on this machine's CPU: the engine compared to PyTorch and to single requests.

    python benchmarks/decode.py                              d4, batches of 1, 8 and 32
    python benchmarks/decode.py --depth 12 --rounds 3
    python benchmarks/decode.py --mixed                      32 mixed requests, batched and not

Both have the same model (classic, random weights), vocabulary and settings: prompts of 256 tokens,
a cache of 512, float32, top-k 50 at temperature 1. The PyTorch loop is the usual one: preallocated
keys and values of which the filled part is read, one step per token, torch.topk and
torch.multinomial. Its greedy tokens must equal the engine's, except for one row in eight: random
weights give near ties, which rounding decides. Contenders are separate processes and take turns;
the fastest round of each counts. Prefill is excluded, except with --mixed. There the requests also
run one at a time, through the same engine and through a faster one with a single slot. Prints a
table, then one JSON line. Needs the extra `torch`, except for --mixed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from contender import Contender

# otherwise torch's idle threads use the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
CONTEXT, ROOM, TOP_K = 256, 512, 50
CHECKED = 8  # number of greedy tokens that are compared


def make_config(options: argparse.Namespace) -> Any:
    from nanochat_jax.model.config import GPTConfig

    return GPTConfig.classic(options.depth, sequence_len=ROOM, vocab_size=options.vocab)


def make_params(config: Any) -> dict[str, Any]:
    """Random weights [in, out], of about the size of trained ones."""
    import jax

    from nanochat_jax.model.weights import abstract_params

    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (
            rng.standard_normal(leaf.shape, np.float32) * np.float32(leaf.shape[-2] ** -0.5)
        ),
        abstract_params(config),
    )


def make_prompts(options: argparse.Namespace, batch: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, options.vocab, (batch, CONTEXT))


def start_jax() -> None:
    from pathlib import Path
    from tempfile import gettempdir

    from nanochat_jax.devices import start
    from nanochat_jax.paths import Paths

    scratch = Paths(Path(gettempdir()) / "nanochat_jax-benchmark")
    scratch.base.mkdir(exist_ok=True)
    start(scratch)


def make_engine(options: argparse.Namespace, num_slots: int) -> Any:
    from nanochat_jax.infer.engine import Engine
    from nanochat_jax.infer.request import NoTokenizer

    start_jax()
    config = make_config(options)
    return Engine(config, make_params(config), NoTokenizer(), num_slots=num_slots)


# (steps, greedy) -> (seconds, tokens by row)
Round = Callable[[int, bool], tuple[float, list[list[int]]]]


def jax_contender(options: argparse.Namespace, batch: int) -> Round:
    from nanochat_jax.infer.engine import EngineLoop
    from nanochat_jax.infer.request import Sampling

    engine = make_engine(options, batch)
    prompts = [tuple(row) for row in make_prompts(options, batch).tolist()]

    def run(steps: int, greedy: bool) -> tuple[float, list[list[int]]]:
        loop = EngineLoop(engine)
        sampling = Sampling(max_tokens=steps, temperature=0.0 if greedy else 1.0, top_k=TOP_K)
        generations = [
            engine.generation(sampling.request(prompt, seed=row))
            for row, prompt in enumerate(prompts)
        ]
        loop.admit(generations)
        loop.fill()
        loop.cache.k[0].block_until_ready()
        began = time.perf_counter()
        while loop.num_active:
            loop.step()
        return time.perf_counter() - began, [generation.tokens for generation in generations]

    return run


def torch_contender(options: argparse.Namespace, batch: int) -> Round:
    import torch
    from torch_reference import GPT, choose

    model = GPT.of(config := make_config(options), make_params(config))
    prompts = torch.from_numpy(make_prompts(options, batch))

    @torch.inference_mode()
    def run(steps: int, greedy: bool) -> tuple[float, list[list[int]]]:
        cache = model.empty_cache(batch)
        for first in range(0, batch, 8):  # limits the memory to that of eight rows
            rows = slice(first, first + 8)
            model.extend(prompts[rows, :-1], [(k[rows], v[rows]) for k, v in cache], 0)
        tokens, columns = prompts[:, -1:], []
        began = time.perf_counter()
        for position in range(CONTEXT - 1, CONTEXT - 1 + steps):
            tokens = choose(model.extend(tokens, cache, position), 0.0 if greedy else 1.0, TOP_K)
            columns.append(tokens[:, 0].tolist())  # for streaming
        return time.perf_counter() - began, [list(row) for row in zip(*columns, strict=True)]

    return run


def worker(name: str, options: argparse.Namespace) -> None:
    """Answer lines "batch steps greedy" of standard input with the round's seconds and tokens."""
    made: dict[int, Round] = {}
    for line in sys.stdin:
        batch, steps, greedy = map(int, line.split())
        if batch not in made:
            made.clear()
            made[batch] = (jax_contender if name == "jax" else torch_contender)(options, batch)
        print(json.dumps(made[batch](steps, bool(greedy))), flush=True)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    contenders = {name: Contender(name) for name in ("jax", "torch")}
    print(
        f"d{options.depth}, vocabulary {options.vocab:,}, float32, {os.cpu_count()} cores; "
        f"only decoding, after {CONTEXT} tokens: {options.steps} steps, top-k {TOP_K}; best of "
        f"{options.rounds} rounds"
    )
    rows = []
    for batch in map(int, options.batches.split(",")):
        # also compiles
        greedy = {
            name: contender.ask(batch, CHECKED, 1)[1] for name, contender in contenders.items()
        }
        apart = sum(a != b for a, b in zip(greedy["jax"], greedy["torch"], strict=True))
        if apart > batch // 8:
            sys.exit(
                f"the greedy tokens differ, so the contenders do not compute the same: {greedy}"
            )
        best = dict.fromkeys(contenders, float("inf"))
        for contender in contenders.values():
            contender.ask(batch, options.steps, 0)  # warm-up
        for _ in range(options.rounds):
            for name, contender in contenders.items():
                seconds = contender.ask(batch, options.steps, 0)[0] / options.steps
                best[name] = min(best[name], seconds)
        rows.append(
            {"batch": batch, "ratio": best["torch"] / best["jax"]}
            | {f"{name}_ms": 1000 * seconds for name, seconds in best.items()}
        )
        print(
            f"  batch {batch:3d}   engine {1000 * best['jax']:7.2f} ms a step "
            f"{batch / best['jax']:7,.0f} tokens/s   "
            f"torch {1000 * best['torch']:7.2f} ms {batch / best['torch']:7,.0f} tokens/s   ratio "
            f"{rows[-1]['ratio']:.2f}",
            flush=True,
        )
    for contender in contenders.values():
        contender.close()
    return {"rows": rows}


def measure_mixed(options: argparse.Namespace) -> dict[str, Any]:
    """Total tokens/s of 32 requests of mixed lengths, submitted together and one at a time."""
    from nanochat_jax.infer.request import Request
    from nanochat_jax.infer.warmup import compile_all

    rng = np.random.default_rng(2)
    requests = [
        Request(
            rng.integers(0, options.vocab, rng.integers(16, 129)).tolist(),
            seed=index,
            top_k=TOP_K,
            max_tokens=int(rng.integers(32, 97)),
        )
        for index in range(32)
    ]
    together, single = make_engine(options, options.slots), make_engine(options, 1)
    compile_all(together)
    compile_all(single)
    best = {}

    def measure(name: str, engine: Any, batches: list[list[Request]]) -> list[list[int]]:
        began = time.perf_counter()
        results = [result for batch in batches for result in engine.generate(batch)]
        rate = sum(len(result.tokens) for result in results) / (time.perf_counter() - began)
        best[name] = max(best.get(name, 0.0), rate)
        return [result.tokens for result in results]

    for _ in range(options.rounds):
        mixed = measure("together", together, [requests])
        alone = measure("one at a time, one slot", single, [[request] for request in requests])
        # the first 8 represent the rest
        measure("one at a time, same engine", together, [[request] for request in requests[:8]])
    equal = sum(a == b for a, b in zip(mixed, alone, strict=True))
    print(
        f"d{options.depth}, vocabulary {options.vocab:,}, float32, {os.cpu_count()} cores; 32 "
        "requests: prompts of 16 to 128 "
        f"tokens, {sum(map(len, mixed))} generated, prefill included; best of {options.rounds} "
        "rounds"
    )
    for name, rate in best.items():
        print(f"  {name:26s} {rate:7,.0f} tokens/s   together is {best['together'] / rate:.2f}x")
    print(f"  {equal} of 32 replies are equal, together and alone")
    return {
        "tokens_per_sec": best,
        "equal_replies": equal,
        "ratio": {
            name: best["together"] / rate for name, rate in best.items() if name != "together"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="of a round")
    parser.add_argument("--slots", type=int, default=32, help="of the batching engine in --mixed")
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not 1 <= options.steps <= ROOM - CONTEXT:
        parser.error(f"--steps must be from 1 to {ROOM - CONTEXT}")
    if options.worker:
        return worker(options.worker, options)
    print(
        json.dumps(
            {
                "benchmark": "decode",
                **vars(options),
                **(measure_mixed if options.mixed else compare)(options),
            }
        )
    )


if __name__ == "__main__":
    main()

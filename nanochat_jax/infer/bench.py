"""Measuring how fast a model generates: prefill, then decoding at several batch sizes.

Random prompts; replies end by length only. The first run of each batch size compiles and is not
counted.

    TTFT   seconds from submission to the first token, with one prompt per row of the batch
    TPOT   median seconds of a decoding step
    MBU    bytes a step must read (weights without the embedding tables, visible keys and values)
           by TPOT, as a fraction of the devices' peak memory bandwidth; unknown on a CPU
    MFU    likewise, of the FLOPs
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np

from nanochat_jax.checkpoint import Loaded
from nanochat_jax.cli import flag
from nanochat_jax.errors import UsageError
from nanochat_jax.infer.engine import Engine, EngineLoop
from nanochat_jax.infer.request import NoTokenizer, Request
from nanochat_jax.metrics import peak_bandwidth, peak_flops, peak_memory_bytes
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.size import num_matrix_params
from nanochat_jax.model.weights import TABLES, abstract_params

STEPS_PER_DISPATCH = 8


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts and replies to measure; the fields are flags of `scripts.infer_bench`."""

    prompt_tokens: int = flag(
        2048,
        "length of the prompts; less if the context is too short for prompt and reply",
        at_least=2,
        at_most=2**24,
    )
    decode_tokens: int = flag(
        256, "tokens to generate per sequence", at_least=1 + STEPS_PER_DISPATCH, at_most=2**24
    )
    batch_sizes: str = flag("1,8,32,128", "list of numbers of parallel sequences")
    temperature: float = flag(
        0.0, "sampling temperature; 0 is greedy", short="-t", at_least=0, at_most=100
    )

    def __post_init__(self) -> None:
        self.batches  # noqa: B018  (validates)

    @property
    def batches(self) -> list[int]:
        try:
            sizes = [int(size) for size in self.batch_sizes.split(",")]
        except ValueError:
            sizes = [0]
        if min(sizes) < 1 or max(sizes) > 10**6:
            raise ValueError(
                "`batch_sizes` must be numbers from 1 to 1000000, as in 1,8,32, got "
                f"{self.batch_sizes!r}"
            )
        return sizes

    def within(self, context: int) -> "Workload":
        """Return this workload with prompts that fit the context. Raises `UsageError`."""
        prompt_tokens = min(self.prompt_tokens, context - self.decode_tokens)
        if prompt_tokens < 2:
            raise UsageError(
                f"`decode_tokens={self.decode_tokens}` leaves no room for a prompt in the context "
                f"of {context}: give fewer"
            )
        return replace(self, prompt_tokens=prompt_tokens)


def run(model: Loaded, compute: Compute, workload: Workload) -> None:
    """Print a table, and a JSON object as the last line."""
    workload = workload.within(model.config.sequence_len)
    card = describe(model.config, compute, workload)
    print(
        f"{model.source} {model.tag}, step {model.step}: {card['num_params'] / 1e6:,.1f}M "
        f"parameters in {compute.dtype} on {card['gpu']}"
    )
    print_card(card)
    # Use only the engines' weights, so that peak memory is theirs.
    dtype = compute.dtype
    model = replace(model, params=jax.tree.map(lambda leaf: leaf.astype(dtype), model.params))

    def make_engine(batch: int) -> Engine:
        return Engine(
            model.config,
            model.params,
            NoTokenizer(),
            num_slots=batch,
            compute=compute,
            max_len=workload.prompt_tokens + workload.decode_tokens,
            steps_per_dispatch=STEPS_PER_DISPATCH,
        )

    prefill = measure_prefill(make_engine(1), card)
    print(
        f"  prefill           {shown(prefill['tok_per_sec'], ' tokens/s', 0)}, MFU "
        f"{shown(prefill['mfu_percent'], ' %')}, {workload.prompt_tokens} tokens\n"
    )
    result = {
        "source": model.source,
        "step": model.step,
        **card,
        "temperature": workload.temperature,
        "sweep": sweep(make_engine, card, workload),
        "prefill": prefill,
    }
    print(json.dumps(result))


def print_card(card: dict[str, Any]) -> None:
    print(
        f"  read each step    {card['weight_bytes'] / 1e6:,.1f} MB of weights, and for each "
        f"sequence {card['kv_read_bytes_per_step'] / 1e6:,.2f} MB of keys and values\n"
        f"  keys and values   {card['kv_bytes_per_token'] / 1e3:,.1f} kB a token; sequences of "
        f"full length that fit: {shown(card['max_full_context_rows'], digits=0)}\n"
        f"  ceiling, batch 1  {shown(card['ceiling_bs1_tok_per_sec'], ' tokens/s', 0)}"
    )


def sweep(
    make_engine: Callable[[int], Engine], card: dict[str, Any], workload: Workload
) -> list[dict[str, Any]]:
    """Measure each batch size and print its row. Sizes that do not fit the memory are skipped."""
    names = ("batch", "TTFT ms", "TPOT ms", "tokens/s", "MBU %", "MFU %", "peak GB", "steps")
    print("{:>6} {:>9} {:>9} {:>10} {:>7} {:>7} {:>8} {:>6}".format(*names))
    rows = []
    for batch in workload.batches:
        try:
            row = measure_batch(make_engine(batch), card, workload.temperature, batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{batch:6d} does not fit into the memory")
            continue
        rows.append(row)
        print(
            f"{batch:6d} {1e3 * row['ttft_sec']:9,.1f} {1e3 * row['tpot_sec']:9,.2f} "
            f"{row['tok_per_sec']:10,.0f} "
            f"{shown(row['mbu_percent']):>7} {shown(row['mfu_percent']):>7} "
            f"{row['peak_vram_bytes'] / 1e9:8.2f} {row['decode_steps']:6d}",
            flush=True,
        )
    return rows


def keys_read(config: GPTConfig, context: int) -> int:
    """Keys that a query at position `context` sees, summed over layers."""
    return sum(context if window is None else min(window + 1, context) for window in config.windows)


def flops_per_token(config: GPTConfig, context: int, *, unembed: bool) -> int:
    """FLOPs of a forward pass for one token with `context` tokens before it."""
    weights = num_matrix_params(config) + config.n_embd * config.vocab_size * unembed
    return 2 * weights + 4 * config.n_head * config.head_dim * keys_read(config, context)


def describe(config: GPTConfig, compute: Compute, workload: Workload) -> dict[str, Any]:
    """Figures known before the run: bytes and FLOPs of the model, peaks of all devices."""
    device, dtype = jax.devices()[0], np.dtype(compute.dtype)
    num_devices = 1 if compute.mesh is None else compute.mesh.size
    shapes, itemsize = abstract_params(config), dtype.itemsize
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    tables = sum(shapes[name].size for name in TABLES if name in shapes)
    weight_bytes = (num_params - tables) * itemsize
    kv_bytes = 2 * config.n_kv_head * config.head_dim * compute.cache_dtype.itemsize
    context_mid = workload.prompt_tokens + workload.decode_tokens // 2
    read = kv_bytes * keys_read(config, context_mid)
    total = (device.memory_stats() or {}).get("bytes_limit")
    peaks = [
        None if peak is None else peak * num_devices
        for peak in (peak_bandwidth(device), peak_flops(device))
    ]
    full_context = kv_bytes * config.n_layer * config.sequence_len
    return {
        "model_config": asdict(config),
        "gpu": f"{num_devices} x {device.device_kind}",
        "peak_bandwidth_bytes_per_sec": peaks[0],
        "total_vram_bytes": total,
        "num_params": num_params,
        "param_dtypes": {str(dtype): num_params},
        "weight_bytes": weight_bytes,
        "kv_bytes_per_token": kv_bytes * config.n_layer,
        "kv_read_bytes_per_step": read,
        "context_mid": context_mid,
        "peak_flops_per_sec": peaks[1],
        "decode_flops_per_token": flops_per_token(config, context_mid, unembed=True),
        "ceiling_bs1_tok_per_sec": peaks[0] and peaks[0] / (weight_bytes + read),
        "max_full_context_rows": total
        and int((total * num_devices - num_params * itemsize) // full_context),
        "prompt_tokens": workload.prompt_tokens,
        "decode_tokens": workload.decode_tokens,
    }


def percent(amount: float, seconds: float, peak: float | None) -> float | None:
    return None if peak is None else 100 * amount / seconds / peak


def prompts(config: GPTConfig, rows: int, length: int, *, seed: int) -> list[tuple[int, ...]]:
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length))
    return [tuple(row) for row in tokens.tolist()]


def run_batch(engine: Engine, requests: list[Request]) -> tuple[float, list[float], float]:
    """(seconds to the first tokens, seconds per step of each dispatch, seconds of all decoding)."""
    loop = EngineLoop(engine)
    began = time.perf_counter()
    loop.admit([engine.generation(request) for request in requests])
    loop.fill()
    loop.step()  # the first tokens
    ttft, steps, last = time.perf_counter() - began, [], time.perf_counter()
    while loop.num_active:
        loop.step()
        now = time.perf_counter()
        steps.append((now - last) / STEPS_PER_DISPATCH)
        last = now
    return ttft, steps, last - began - ttft


def measure_batch(
    engine: Engine, card: dict[str, Any], temperature: float, batch: int
) -> dict[str, Any]:
    """One row of the table. A reply has one token and then complete dispatches."""
    tokens = 1 + (card["decode_tokens"] - 1) // STEPS_PER_DISPATCH * STEPS_PER_DISPATCH
    requests = [
        Request(prompt, max_tokens=tokens, temperature=temperature, seed=row)
        for row, prompt in enumerate(prompts(engine.config, batch, card["prompt_tokens"], seed=0))
    ]
    run_batch(engine, requests)  # compiles
    ttft, steps, seconds = run_batch(engine, requests)
    tpot = statistics.median(steps)
    read = card["weight_bytes"] + batch * card["kv_read_bytes_per_step"]
    return {
        "batch_size": batch,
        "ttft_sec": ttft,
        "tpot_sec": tpot,
        "tok_per_sec": batch * (tokens - 1) / seconds,
        "mbu_percent": percent(read, tpot, card["peak_bandwidth_bytes_per_sec"]),
        "mfu_percent": percent(
            batch * card["decode_flops_per_token"], tpot, card["peak_flops_per_sec"]
        ),
        "peak_vram_bytes": peak_memory_bytes(),
        "decode_steps": tokens - 1,
    }


def measure_prefill(engine: Engine, card: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of one prompt's prefill, the fastest of three."""
    length, times = card["prompt_tokens"] - 1, []
    for seed in range(4):
        loop = EngineLoop(engine)
        generation = engine.generation(
            Request(prompts(engine.config, 1, length + 1, seed=seed)[0], max_tokens=1)
        )
        loop.resize(engine.cache_buckets[-1])
        jax.block_until_ready(loop.cache)
        began = time.perf_counter()
        loop.admit([generation])
        loop.fill()
        jax.block_until_ready(loop.cache)
        times.append(time.perf_counter() - began)
    seconds = min(times[1:])
    flops = length * flops_per_token(engine.config, length // 2, unembed=False)
    return {
        "tok_per_sec": length / seconds,
        "mfu_percent": percent(flops, seconds, card["peak_flops_per_sec"]),
        "time_sec": seconds,
    }


def shown(value: float | None, unit: str = "", digits: int = 1) -> str:
    return "n/a" if value is None else f"{value:,.{digits}f}{unit}"

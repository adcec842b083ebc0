"""How fast a model generates on this machine: prefill, then decoding at several batch sizes.

    python -m scripts.infer_bench                                   the newest base model
    python -m scripts.infer_bench -i sft --batch-sizes 1,16 --decode-tokens 64

Measures the engine on random prompts; replies end by length only. The first run of each batch size
compiles and is not counted. Prints a table, and a JSON object as the last line.

    TTFT   seconds from submission to the first token, with one prompt per row of the batch
    TPOT   median seconds of a decoding step
    MBU    bytes a step must read (weights without the embedding tables, visible keys and values)
           by TPOT, as a fraction of the devices' peak memory bandwidth; unknown on a CPU
    MFU    likewise, of the FLOPs
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax import cli
from nanochat_jax.checkpoint import Loaded, load_model
from nanochat_jax.cli import flag
from nanochat_jax.devices import ModelFlags, start
from nanochat_jax.errors import UsageError
from nanochat_jax.infer.engine import Engine, EngineLoop
from nanochat_jax.infer.request import NoTokenizer, Request
from nanochat_jax.metrics import peak_bandwidth, peak_flops, peak_memory_bytes
from nanochat_jax.model.compute import Compute, resolve_dtype
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.model.size import num_matrix_params
from nanochat_jax.model.weights import abstract_params
from nanochat_jax.paths import CHECKPOINT_DIRS, Paths

STEPS_PER_DISPATCH = 8


@dataclass(frozen=True, kw_only=True)
class Config(ModelFlags):
    source: str = flag(
        "base", "stage whose model to load", short="-i", choices=list(CHECKPOINT_DIRS)
    )
    prompt_tokens: int = flag(
        2048,
        "length of the prompts; less where the context is too short for prompt and reply",
        at_least=2,
        at_most=2**24,
    )
    decode_tokens: int = flag(
        256, "tokens to generate after each", at_least=1 + STEPS_PER_DISPATCH, at_most=2**24
    )
    batch_sizes: str = flag("1,8,32,128", "sequences at once, a list")
    temperature: float = flag(
        0.0,
        "sampling temperature; 0 takes the most likely token each time",
        short="-t",
        at_least=0,
        at_most=100,
    )
    mesh: str = flag("1x1", "devices as DxM: slots over D, heads over M; auto uses all on D")

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
                "--batch-sizes must be numbers from 1 to 1000000, as in 1,8,32, got "
                f"{self.batch_sizes!r}"
            )
        return sizes


def keys_read(config: GPTConfig, context: int) -> int:
    """Keys that a query at position `context` sees, summed over layers."""
    return sum(context if window is None else min(window + 1, context) for window in config.windows)


def flops_per_token(config: GPTConfig, context: int, *, unembed: bool) -> int:
    """FLOPs of a forward pass for one token with `context` tokens before it."""
    weights = num_matrix_params(config) + config.n_embd * config.vocab_size * unembed
    return 2 * weights + 4 * config.n_head * config.head_dim * keys_read(config, context)


def describe(
    loaded: Loaded, dtype: Any, mesh: Mesh, *, prompt_tokens: int, decode_tokens: int
) -> dict[str, Any]:
    """Figures known before the run: bytes and FLOPs of the model, peaks of all devices."""
    config, device = loaded.config, jax.devices()[0]
    shapes, itemsize = abstract_params(config), np.dtype(dtype).itemsize
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    tables = sum(shapes[name].size for name in ("wte", "value_embeds") if name in shapes)
    weight_bytes = (num_params - tables) * itemsize
    kv_bytes = 2 * config.n_kv_head * config.head_dim * itemsize
    context_mid = prompt_tokens + decode_tokens // 2
    read = kv_bytes * keys_read(config, context_mid)
    total = (device.memory_stats() or {}).get("bytes_limit")
    peaks = [
        None if peak is None else peak * mesh.size
        for peak in (peak_bandwidth(device), peak_flops(device))
    ]
    full_context = kv_bytes * config.n_layer * config.sequence_len
    return {
        "model_config": asdict(config),
        "gpu": f"{mesh.size} x {device.device_kind}",
        "peak_bandwidth_bytes_per_sec": peaks[0],
        "total_vram_bytes": total,
        "num_params": num_params,
        "param_dtypes": {str(np.dtype(dtype)): num_params},
        "weight_bytes": weight_bytes,
        "kv_bytes_per_token": kv_bytes * config.n_layer,
        "kv_read_bytes_per_step": read,
        "context_mid": context_mid,
        "peak_flops_per_sec": peaks[1],
        "decode_flops_per_token": flops_per_token(config, context_mid, unembed=True),
        "ceiling_bs1_tok_per_sec": peaks[0] and peaks[0] / (weight_bytes + read),
        "max_full_context_rows": total
        and int((total * mesh.size - num_params * itemsize) // full_context),
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
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
    loop.step()  # the first tokens
    ttft, steps, last = time.perf_counter() - began, [], time.perf_counter()
    while loop.num_active:
        loop.step()
        now = time.perf_counter()
        steps.append((now - last) / STEPS_PER_DISPATCH)
        last = now
    return ttft, steps, last - began - ttft


def measure_batch(
    engine: Engine, card: dict[str, Any], config: Config, batch: int
) -> dict[str, Any]:
    """One row of the table. A reply has one token and then complete dispatches."""
    tokens = 1 + (card["decode_tokens"] - 1) // STEPS_PER_DISPATCH * STEPS_PER_DISPATCH
    requests = [
        Request(prompt, max_tokens=tokens, temperature=config.temperature, seed=row)
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
    """Tokens/s of one prompt's prefill, the fastest of three.

    The prompt's last token is left to decoding, so nothing is unembedded.
    """
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


def main(config: Config) -> None:
    paths = Paths.from_env()
    start(paths, config)
    mesh, dtype = make_mesh(config.mesh), resolve_dtype(config.dtype)
    loaded = load_model(paths, config.source, tag=config.model_tag, step=config.step, mesh=mesh)
    prompt_tokens = min(config.prompt_tokens, loaded.config.sequence_len - config.decode_tokens)
    if prompt_tokens < 2:
        raise UsageError(
            f"--decode-tokens {config.decode_tokens} leaves no room for a prompt in the context of "
            f"{loaded.config.sequence_len}: give fewer"
        )
    card = describe(
        loaded, dtype, mesh, prompt_tokens=prompt_tokens, decode_tokens=config.decode_tokens
    )
    print(
        f"{config.source} {loaded.tag}, step {loaded.step}: {card['num_params'] / 1e6:,.1f}M "
        f"parameters in {np.dtype(dtype)} "
        f"on {card['gpu']}\n"
        f"  read each step    {card['weight_bytes'] / 1e6:,.1f} MB of weights, and for each "
        "sequence "
        f"{card['kv_read_bytes_per_step'] / 1e6:,.2f} MB of keys and values\n"
        f"  keys and values   {card['kv_bytes_per_token'] / 1e3:,.1f} kB a token; sequences of "
        "full length that fit: "
        f"{shown(card['max_full_context_rows'], digits=0)}\n"
        f"  ceiling, batch 1  {shown(card['ceiling_bs1_tok_per_sec'], ' tokens/s', 0)}"
    )

    # Use only the engines' weights, so that peak memory is theirs.
    loaded = replace(loaded, params=jax.tree.map(lambda leaf: leaf.astype(dtype), loaded.params))

    def make_engine(batch: int) -> Engine:
        return Engine(
            loaded.config,
            loaded.params,
            NoTokenizer(),
            num_slots=batch,
            compute=Compute.on(mesh, dtype=dtype),
            max_len=prompt_tokens + config.decode_tokens,
            steps_per_dispatch=STEPS_PER_DISPATCH,
        )

    prefill = measure_prefill(make_engine(1), card)
    print(
        f"  prefill           {shown(prefill['tok_per_sec'], ' tokens/s', 0)}, MFU "
        f"{shown(prefill['mfu_percent'], ' %')}, "
        f"{prompt_tokens} tokens\n"
    )
    print(
        f"{'batch':>6} {'TTFT ms':>9} {'TPOT ms':>9} {'tokens/s':>10} {'MBU %':>7} {'MFU %':>7} "
        f"{'peak GB':>8} {'steps':>6}"
    )
    sweep = []
    for batch in config.batches:
        try:
            row = measure_batch(make_engine(batch), card, config, batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{batch:6d} does not fit into the memory")
            continue
        sweep.append(row)
        print(
            f"{batch:6d} {1e3 * row['ttft_sec']:9,.1f} {1e3 * row['tpot_sec']:9,.2f} "
            f"{row['tok_per_sec']:10,.0f} "
            f"{shown(row['mbu_percent']):>7} {shown(row['mfu_percent']):>7} "
            f"{row['peak_vram_bytes'] / 1e9:8.2f} "
            f"{row['decode_steps']:6d}",
            flush=True,
        )
    print(
        json.dumps(
            {
                "source": config.source,
                "step": loaded.step,
                **card,
                "temperature": config.temperature,
                "sweep": sweep,
                "prefill": prefill,
            }
        )
    )


if __name__ == "__main__":
    cli.run(main, Config, prog="scripts.infer_bench", description=__doc__)

"""Training at full size: the step that `speedrun` runs on one device."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import program
from benchmarks.gpu.plan import Size
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.timing import seconds_per_call, trace_kernels

TRACED_STEPS = 3


def train(record: Recorder, size: Size, *, rows: int, repeat: bool = False) -> None:
    """Compile seconds, step time, memory and longest kernels of `rows` rows per micro-batch.

    Args:
        repeat: also check that the same steps from the same state give the same bits.
    """
    rows = 2 if size.tiny else rows
    config = program.modern_config(size.depth, size)
    training = program.Training(config, rows=rows, accumulation=size.accumulation)
    label = f"d{size.depth} rows {rows} x {size.accumulation}"
    step = measure(record, training, size.steps, label)
    if repeat:
        record("same bits", same=same_bits(training, step))


def measure(record: Recorder, training: program.Training, count: int, label: str) -> Any:
    """Record how fast the step is; return the compiled step."""
    state = training.new_state()
    step, needed, seconds = training.compile(state)
    record(
        "compile",
        what=label,
        dtype=str(training.dtype),
        compile_seconds=seconds,
        needed_gib=needed / 2**30,
        estimated_gib=training.estimated_bytes() / 2**30,
    )
    batch, losses = training.batch(), []

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
        return metrics["loss"]

    seconds = seconds_per_call(run, count, rounds=2)
    values = [float(loss) for loss in losses]
    record(
        "step",
        what=label,
        ms=1e3 * seconds,
        tokens_per_second=training.tokens / seconds,
        mfu=training.mfu(seconds),
        tokens=training.tokens,
        peak_gib=program.peak_memory_bytes() / 2**30,
        first_loss=values[0],
        last_loss=values[-1],
        ok=all(map(math.isfinite, values)),
    )

    def traced() -> None:
        for _ in range(TRACED_STEPS):
            run()
        jax.block_until_ready(state)

    record("trace", what=label, **trace_kernels(traced, TRACED_STEPS))
    return step


@jax.jit
def checksums(tree: Any) -> list[jax.Array]:
    """Two sums of the bits of each float32 or int32 leaf, the second weighted by position."""

    def both(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf.ravel(), jnp.uint32)
        position = jax.lax.iota(jnp.uint32, bits.size) | 1
        return jnp.stack([bits.sum(dtype=jnp.uint32), (bits * position).sum(dtype=jnp.uint32)])

    return [both(leaf) for leaf in jax.tree.leaves(tree)]


def same_bits(training: program.Training, step: Any) -> bool:
    """Whether two times two steps from the same state end with the same bits."""
    sums = []
    for _ in range(2):
        state = training.new_state()
        for _ in range(2):
            state, _ = step(state, training.batch())
        sums.append(jax.device_get(checksums(state)))
        del state
    return all((a == b).all() for a, b in zip(*sums, strict=True))

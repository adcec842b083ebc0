"""Decoding at full size: milliseconds per token against what memory bandwidth allows."""

from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.gpu import program
from benchmarks.gpu.plan import Size
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.timing import has_gpu, seconds_per_call, trace_kernels


def decode(record: Recorder, size: Size, *, rows: Sequence[int]) -> None:
    """Decode the modern model at each number of rows; trace all of them after all are timed."""
    if not has_gpu():
        record("command buffers", value="no GPU")
        rows = rows[:1]
    config = program.modern_config(size.depth, size)
    params = None
    traced = []
    for count in rows:
        decoding = program.Decoding(config, count, size.decode_tokens)
        params = decoding.new_params() if params is None else params
        traced.append((count, measure(record, decoding, params)))
    for count, run in traced:
        record(
            "trace", rows=count, tokens=size.decode_tokens, **trace_kernels(run, size.decode_tokens)
        )


def measure(record: Recorder, decoding: program.Decoding, params: Any) -> Any:
    """Time one number of rows; return a function that decodes once more."""
    slots = decoding.new_slots()
    run, compile_seconds = decoding.compile(params, slots)
    record("compile", rows=decoding.rows, compile_seconds=compile_seconds)

    def dispatch() -> Any:
        nonlocal slots
        slots, emitted = run(params, slots)
        return emitted

    if int((jax.device_get(dispatch()) < 0).sum()):
        raise RuntimeError("decoding ended before its last token")
    seconds = seconds_per_call(dispatch, 2) / decoding.tokens
    needed = decoding.bytes_per_token()
    read = needed["weights"] + needed["cache_windowed"]
    peak = program.peak_bandwidth(jax.devices()[0])
    record(
        "token",
        rows=decoding.rows,
        ms=1e3 * seconds,
        tokens_per_second=decoding.rows / seconds,
        bytes_needed=read,
        bytes_full_cache=needed["weights"] + needed["cache_full"],
        bandwidth_share=peak and read / seconds / peak,
        peak_gib=program.peak_memory_bytes() / 2**30,
    )
    return lambda: jax.block_until_ready(dispatch())

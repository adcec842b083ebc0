"""Seconds per call, and which kernels take them."""

import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

LONGEST = 30


def has_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


def seconds_per_call(
    call: Callable[[], Any],
    calls: int,
    rounds: int = 3,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> float:
    """Seconds of one call: `calls` are dispatched, then all are waited for; the fastest round.

    A first call, not timed, compiles.
    """
    wait(call())
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        results = [call() for _ in range(calls)]
        wait(results)
        times.append((time.perf_counter() - began) / calls)
    return min(times)


def trace_kernels(run: Callable[[], Any], units: int) -> dict[str, Any]:
    """Trace `run`, which waits for its results, and reduce the trace to its longest kernels.

    Args:
        units: steps or tokens that `run` computes; all figures are per unit.

    Returns:
        kernels: the 30 longest, [name, milliseconds, calls].
        families: the same, with names that differ only in numbers added up.
        busy_ms: sum over all kernels. span_ms: from the first to the end of the last. calls.
    """
    folder = Path(tempfile.mkdtemp(prefix="nanochat_jax-trace-"))
    try:
        with jax.profiler.trace(str(folder)):
            run()
        path = next(folder.rglob("*.xplane.pb"))
        events = list(device_events(jax.profiler.ProfileData.from_file(str(path))))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return reduce_events(events, units)


def device_events(profile: Any) -> Iterable[tuple[str, float, float]]:
    """(name, start, duration) in nanoseconds of what ran on GPUs, or of XLA's threads on a CPU."""
    planes = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    prefix = "Stream"
    if not planes:
        planes = [plane for plane in profile.planes if plane.name == "/host:CPU"]
        prefix = "tf_XLA"
    for plane in planes:
        for line in plane.lines:
            if line.name.startswith(prefix):
                for event in line.events:
                    yield event.name, event.start_ns, event.duration_ns


def reduce_events(events: list[tuple[str, float, float]], units: int) -> dict[str, Any]:
    if not events:
        raise RuntimeError("the trace has no kernels: is CUPTI (nvidia-cuda-cupti) installed?")
    total: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    families: Counter[str] = Counter()
    family_calls: Counter[str] = Counter()
    for name, _, duration in events:
        family = re.sub(r"[._]?\d+", "", name)
        total[name] += duration
        calls[name] += 1
        families[family] += duration
        family_calls[family] += 1
    first = min(start for _, start, _ in events)
    last = max(start + duration for _, start, duration in events)

    def longest(times: Counter[str], counts: Counter[str]) -> list[list[Any]]:
        return [
            [name, time / units / 1e6, counts[name] / units]
            for name, time in times.most_common(LONGEST)
        ]

    return {
        "kernels": longest(total, calls),
        "families": longest(families, family_calls),
        "busy_ms": total.total() / units / 1e6,
        "span_ms": (last - first) / units / 1e6,
        "calls": len(events) / units,
    }

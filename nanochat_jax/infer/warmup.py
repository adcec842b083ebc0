"""Compiling an engine's programs before requests need them, those of a first short chat first."""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax

from nanochat_jax.errors import one_line
from nanochat_jax.infer.decode import Slots
from nanochat_jax.infer.engine import Engine, EngineLoop

log = logging.getLogger(__name__)

MOST_THREADS = 4  # a compiler uses several cores and, for a large model, gigabytes


class _Compiler(EngineLoop):
    """Compiles what an `EngineLoop` runs. Its cache has shapes and shardings, but no memory."""

    def __init__(self, engine: Engine, cache: Slots) -> None:
        super().__init__(engine)
        self.cache = cache

    def run(self, function: Any, *args: Any, sizes: tuple[int, ...], **static: Any) -> Any:
        engine = self._engine
        with engine.programs.use(function.__name__, *sizes, ahead=True):
            lowered = function.lower(*args, static=engine.static, **static)
            shardings = lowered.compile().output_shardings
        if engine.static.compute.mesh is None:  # an uncommitted array, as jitted functions return
            return lowered.out_info
        return jax.tree.map(
            lambda out, sharding: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding),
            lowered.out_info,
            shardings,
        )


def _steps(engine: Engine) -> list[tuple[int, Callable[[EngineLoop], Any]]]:
    """Calls that need one program each, first those needed first, and the cache length of each."""
    steps: list[tuple[int, Callable[[EngineLoop], Any]]] = []
    shorter = None
    for size in engine.cache_buckets:
        if shorter is not None:
            steps.append((shorter, functools.partial(EngineLoop.resize, length=size)))
        for rows in engine.row_buckets:
            steps += [
                (size, functools.partial(EngineLoop.prefill, batch=(), rows=rows, piece=piece))
                for prefill_rows, piece in engine.prefill_shapes
                if prefill_rows == rows
            ]
            steps.append((size, functools.partial(EngineLoop.decode, active=(), rows=rows)))
        steps.append((size, functools.partial(EngineLoop.copy, source=0, target=0)))
        if shorter is not None:
            steps.append((size, functools.partial(EngineLoop.resize, length=shorter)))
        shorter = size
    return steps


@contextlib.contextmanager
def warmup(engine: Engine) -> Iterator[list[futures.Future]]:
    """Compile every program that serving can need, in other threads, while the block runs.

    Gives a future for each program. At the end of the block, waits for the compilations in
    progress only.
    """
    steps, programs, began = _steps(engine), engine.programs, time.monotonic()
    programs.total = 1 + len(steps)

    @functools.cache
    def cache(length: int) -> Slots:
        first = _Compiler(engine, Slots((), ()))
        first.resize(engine.cache_buckets[0])
        return jax.tree.map(
            lambda x: x.update(shape=(*x.shape[:2], length, x.shape[3])), first.cache
        )

    def compile_step(length: int, call: Callable[[EngineLoop], Any]) -> None:
        try:
            call(_Compiler(engine, cache(length)))
        except Exception as error:  # the request that needs it compiles it again, and fails
            programs.total -= 1
            log.warning("a program for %d positions is not compiled: %s", length, one_line(error))
            raise
        if not programs.left:
            seconds = time.monotonic() - began
            log.info("all %d programs are compiled (%.1f s)", programs.compiled, seconds)

    threads = min(MOST_THREADS, max(1, (os.cpu_count() or 1) // 2))
    with futures.ThreadPoolExecutor(threads, thread_name_prefix="compiler") as pool:
        try:
            yield [pool.submit(compile_step, *step) for step in steps]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def compile_all(engine: Engine) -> None:
    """Compile every program that serving can need."""
    with warmup(engine) as compilations:
        for compilation in compilations:
            compilation.result()

"""Stopping a run from outside: SIGTERM, Ctrl-C and preemption notices become a question that the
loop asks each step.

In a run of one process, Python handles SIGTERM and SIGINT. In a run of several, SIGTERM belongs to
JAX's preemption service, which tells all processes and agrees with them on the step at which all
of them stop; Ctrl-C is passed to it. A preempted TPU VM announces itself by the same SIGTERM.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_STOPPED = 75  # a signal stopped the run after a save: run the same command again to go on


class Interrupted(Exception):
    """Raised by a signal inside `StopRequest.interruptible`."""


class StopRequest:
    """The first signal asks the loop to save and stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._several = jax.process_count() > 1
        self._interruptible = False

    def __enter__(self) -> "StopRequest":
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._old = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._interruptible:
            raise Interrupted

    def reached(self, step: int) -> bool:
        """Whether the run stops at this step; the same answer in all processes, which must all ask
        at every step.
        """
        if not self._several:
            return self.signal is not None
        if not multihost_utils.reached_preemption_sync_point(step):
            return False
        self.signal = self.signal or signal.SIGTERM  # perhaps another process's
        self._old[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._handle) or signal.SIG_DFL
        return True

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal raises `Interrupted` (in a run of several processes it waits for the
        next step): for work that can be thrown away, such as an evaluation, which may last longer
        than a preempted machine lives.
        """
        self._interruptible = True
        try:
            if self.signal is not None and not self._several:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

"""Stopping a run by SIGTERM, Ctrl-C or a preemption notice, which the loop polls each step.

With one process, Python handles SIGTERM and SIGINT. With several, JAX's preemption service handles
SIGTERM: all processes agree on the step at which they stop. Ctrl-C is forwarded to it. A preempted
TPU VM sends the same SIGTERM.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_STOPPED = 75  # stopped by a signal after a save; the same command with --resume continues


class Interrupted(Exception):
    """Raised by a signal inside `StopRequest.interruptible`."""


class StopRequest:
    """The first signal requests a save and a stop; a second one ends the process immediately."""

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
        """Whether the run stops at this step.

        The answer is the same in all processes, which must all ask at every step.
        """
        if not self._several:
            return self.signal is not None
        if not multihost_utils.reached_preemption_sync_point(step):
            return False
        self.signal = self.signal or signal.SIGTERM  # if another process got the signal
        self._old[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._handle) or signal.SIG_DFL
        return True

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside this block, a signal raises `Interrupted`.

        For work that can be discarded, such as an evaluation, which can outlast a preempted
        machine. With several processes the signal waits for the next step.
        """
        self._interruptible = True
        try:
            if self.signal is not None and not self._several:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

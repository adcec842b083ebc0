"""Which programs of an engine are compiled, so that no two threads compile the same one."""

import contextlib
import logging
import threading
from collections.abc import Iterator

log = logging.getLogger(__name__)


class Programs:
    """The programs of one engine, by the name and the sizes of a jitted function.

    Attributes:
        total: number of programs that `warmup` compiles; 0 if nothing is compiled ahead.
    """

    def __init__(self) -> None:
        self.total = 0
        self._compiled: set[tuple[str | int, ...]] = set()
        self._in_progress: set[tuple[str | int, ...]] = set()
        self._needed = 0  # programs that the engine waits for
        self._changed = threading.Condition()

    @property
    def compiled(self) -> int:
        return len(self._compiled)

    @property
    def left(self) -> int:
        """Number of programs that `warmup` has still to compile."""
        return max(0, self.total - self.compiled)

    @contextlib.contextmanager
    def use(self, *program: str | int, ahead: bool = False) -> Iterator[None]:
        """Use a program in the block; the first use compiles it.

        Waits while another thread compiles it. With `ahead`, also waits while the engine waits for
        any program, because compilers compete for cores.
        """
        if program in self._compiled:
            yield
            return
        with self._changed:
            self._needed += not ahead
            self._changed.wait_for(
                lambda: program not in self._in_progress and not (ahead and self._needed)
            )
            if program not in self._compiled:
                log.debug("compiling %s%s", program, "" if ahead else " for a request")
            self._in_progress.add(program)
        try:
            yield
            self._compiled.add(program)
        finally:
            with self._changed:
                self._needed -= not ahead
                self._in_progress.discard(program)
                self._changed.notify_all()

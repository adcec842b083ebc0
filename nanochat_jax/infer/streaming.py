"""Bytes of tokens to text that can be shown as it comes: whole characters, nothing that a stop
string takes back.
"""

import codecs
from collections.abc import Sequence


class TextStream:
    """Incremental UTF-8 decoding with stop strings.

    A character whose bytes are spread over several tokens appears when its last byte has come.
    Text that may turn out to be the beginning of a stop string is held back until it is known not
    to be.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False  # a stop string has come; the text ends before it

    def feed(self, data: bytes) -> str:
        """Text that became certain with these bytes (often "")."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data)
        starts = [start for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            ready, self._held = self._held[: min(starts)], ""
            return ready
        cut = len(self._held) - self._possible_stop()
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def break_character(self) -> None:
        """Forget the bytes of an unfinished character: what follows does not continue it."""
        self._decoder.reset()

    def finish(self) -> str:
        """The text still held back; an unfinished character at the end has no text and is left
        out.
        """
        self.break_character()
        ready, self._held = self._held, ""
        return ready

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0

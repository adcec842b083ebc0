"""Token bytes to text for streaming: complete characters, never part of a stop string."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Incremental UTF-8 decoding with stop strings.

    A character split across tokens is returned after its last byte. Text that may begin a stop
    string is held back until later text rules that out.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False  # a stop string was found; the text ends before it

    def feed(self, data: bytes) -> str:
        """Return the text that these bytes complete (often "")."""
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
        """Discard the bytes of an incomplete character."""
        self._decoder.reset()

    def finish(self) -> str:
        """Return the text still held back, without an incomplete last character."""
        self.break_character()
        ready, self._held = self._held, ""
        return ready

    def _possible_stop(self) -> int:
        """Return the length of the longest suffix of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0

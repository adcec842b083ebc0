"""Packing of documents into rows of tokens: BOS-aligned best fit, and a plain token stream.

A packer's state has the position and length of each buffered document, not its tokens. Packing
depends on lengths only, so a restored packer reads and tokenizes a document when a row takes it.
"""

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from nanochat_jax.data.documents import DocumentStream, Position
from nanochat_jax.errors import UsageError

State = dict[str, Any]  # JSON-serializable
# Makes the state at the time of the snapshot. Every batch has a snapshot, so taking one only
# copies a list; the state is made if it is saved.
Snapshot = Callable[[], State]
Rows = tuple[np.ndarray, np.ndarray]  # inputs, targets: int32 [rows, T]

STATE_CHANGED = (
    "the tokenizer or the texts have changed since this data position was saved: start without it"
)


class FitBuffer:
    """Buffer of items, removed by length: the longest that fits, or the shortest.

    On ties, the first added is removed. Entries are sorted by (length, -arrival), so both choices
    are bisections.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, Any]] = []  # (length, -arrival, item)
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, length: int, item: Any) -> None:
        insort(self._entries, (length, -self._arrivals, item))
        self._arrivals += 1

    def pop_longest(self, limit: int) -> tuple[int, Any] | None:
        """(length, item) of the longest item of length <= `limit`; None if there is none."""
        index = bisect_left(self._entries, (limit + 1,)) - 1
        if index < 0:
            return None
        length, _, item = self._entries.pop(index)
        return length, item

    def pop_shortest(self) -> tuple[int, Any]:
        shortest = self.pop_longest(self._entries[0][0])
        assert shortest is not None
        return shortest

    def snapshot(self) -> Callable[[], list[tuple[int, Any]]]:
        """Makes the list of (length, item) that the buffer has now, in the order added."""
        entries = self._entries.copy()

        def by_arrival() -> list[tuple[int, Any]]:
            entries.sort(key=lambda entry: -entry[1])
            return [(length, item) for length, _, item in entries]

        return by_arrival


class TokenRun:
    """Concatenated token arrays, cut into rows at any position."""

    def __init__(self, next_piece: Callable[[], np.ndarray]):
        self._next_piece = next_piece
        # the current array, and the number of its tokens already used
        self.piece, self.offset = np.empty(0, np.int32), 0

    def next_rows(self, count: int, length: int) -> Rows:
        """(inputs, targets), each [count, length], from the next count * length + 1 tokens.

        Targets are the inputs shifted by one, also across rows. The last token is only a target.
        """
        flat = np.empty(count * length + 1, np.int32)
        filled = 0
        while filled < len(flat):
            if self.offset == len(self.piece):
                self.piece, self.offset = self._next_piece(), 0
            part = self.piece[self.offset : self.offset + len(flat) - filled]
            flat[filled : filled + len(part)] = part
            filled += len(part)
            self.offset += len(part)
        return flat[:-1].reshape(count, length), flat[1:].reshape(count, length)


class Packer:
    """Base of both packers. `set_state` continues after the rows at which a state was taken."""

    def __init__(self, documents: DocumentStream, sequence_len: int):
        self._documents, self._sequence_len = documents, sequence_len

    def next_rows(self, count: int) -> Rows:
        raise NotImplementedError

    def snapshot(self) -> Snapshot:
        raise NotImplementedError

    def set_state(self, state: State) -> None:
        file = self._documents.file_index(state["position"]["file"])
        self._documents.seek(Position(**state["position"] | {"file": file}))

    @property
    def position(self) -> dict[str, Any]:
        """The position at which the next document is read."""
        return self._to_json(self._documents.position)

    def _to_json(self, position: Position) -> dict[str, Any]:
        return position._asdict() | {"file": self._documents.file_name(position.file)}


class BestFitPacker(Packer):
    """Rows that start with BOS, without padding; crops documents (upstream since January 2026).

    A row has T+1 tokens. While it has space, it takes the longest buffered document that fits. If
    none fits, it takes the shortest, cropped to the space. Attention crosses document boundaries.

    The buffer has at least `buffer_docs` documents at every choice, unless that would read a third
    pass of the corpus. Documents longer than a row are rarely chosen; in a small corpus, they would
    fill the buffer pass after pass and never be trained on.
    """

    def __init__(self, documents: DocumentStream, sequence_len: int, *, buffer_docs: int = 1000):
        super().__init__(documents, sequence_len)
        self._capacity, self._buffer_docs = sequence_len + 1, buffer_docs
        self._clear()

    def next_rows(self, count: int) -> Rows:
        rows = np.empty((count, self._capacity), np.int32)
        for row in rows:
            filled = 0
            while filled < self._capacity:
                self._refill()
                space = self._capacity - filled
                _, (number, at) = self._buffer.pop_longest(space) or self._buffer.pop_shortest()
                piece = self._take(number, at)[:space]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
        return rows[:, :-1], rows[:, 1:]

    def snapshot(self) -> Snapshot:
        position, buffered = self._documents.position, self._buffer.snapshot()

        def state() -> State:
            documents = [(length, at) for length, (_, at) in buffered()]
            files = sorted({at.file for _, at in documents})
            return {
                "position": self._to_json(position),
                "files": list(map(self._documents.file_name, files)),
                "buffer": [
                    [at.epoch, files.index(at.file), at.row_group, at.row, length]
                    for length, at in documents
                ],
            }

        return state

    def set_state(self, state: State) -> None:
        super().set_state(state)
        self._clear()
        files = [self._documents.file_index(name) for name in state["files"]]
        for epoch, file, row_group, row, length in state["buffer"]:
            at = Position(epoch, files[file], row_group, row)
            self._unread.setdefault(at[:3], []).append((self._added, length, at))
            self._add(length, at)

    def _clear(self) -> None:
        self._buffer = FitBuffer()  # items: (number, position)
        self._added = 0  # documents added so far; each one's number is its key below
        self._per_epoch: Counter[int] = Counter()  # buffered documents of each pass
        self._tokens: dict[int, np.ndarray] = {}
        # Restored documents that are not read yet, by row group: (number, length, position).
        self._unread: dict[tuple[int, ...], list[tuple[int, int, Position]]] = {}

    def _add(self, length: int, at: Position) -> None:
        self._buffer.add(length, (self._added, at))
        self._added += 1
        self._per_epoch[at.epoch] += 1

    def _cache(self, number: int, tokens: np.ndarray) -> None:
        # A copy: a view would hold everything that was encoded with it in memory.
        self._tokens[number] = tokens[: self._capacity].copy()

    def _refill(self) -> None:
        while len(self._buffer) < self._buffer_docs:
            if self._per_epoch and self._documents.position.epoch > min(self._per_epoch) + 1:
                return
            for at, tokens in self._documents.next_batch():
                self._cache(self._added, tokens)
                self._add(len(tokens), at)

    def _take(self, number: int, at: Position) -> np.ndarray:
        self._per_epoch[at.epoch] -= 1
        if not self._per_epoch[at.epoch]:
            del self._per_epoch[at.epoch]
        if number not in self._tokens:
            # Load all unread documents of the row group: they are likely to be taken soon.
            group = self._unread.pop(at[:3])
            loaded = self._documents.load([position for _, _, position in group])
            for (other, length, _), tokens in zip(group, loaded, strict=True):
                if len(tokens) != length:
                    raise UsageError(STATE_CHANGED)
                self._cache(other, tokens)
        return self._tokens.pop(number)


class StreamPacker(Packer):
    """Concatenated documents, cut anywhere (upstream until January 2026), as a `TokenRun`."""

    def __init__(self, documents: DocumentStream, sequence_len: int):
        super().__init__(documents, sequence_len)
        self._waiting: deque[tuple[Position, np.ndarray]] = deque()
        self._at = documents.position  # position of the run's current document
        self._run = TokenRun(self._next_document)

    def next_rows(self, count: int) -> Rows:
        return self._run.next_rows(count, self._sequence_len)

    def snapshot(self) -> Snapshot:
        at, offset = self._at, self._run.offset
        if offset == len(self._run.piece):
            at, offset = self._waiting[0][0] if self._waiting else self._documents.position, 0
        return lambda: {"position": self._to_json(at), "offset": offset}

    def set_state(self, state: State) -> None:
        super().set_state(state)
        self._waiting.clear()
        self._run = TokenRun(self._next_document)
        if state["offset"]:
            self._run.piece, self._run.offset = self._next_document(), state["offset"]
            if self._run.offset >= len(self._run.piece):
                raise UsageError(STATE_CHANGED)

    def _next_document(self) -> np.ndarray:
        if not self._waiting:
            self._waiting.extend(self._documents.next_batch())
        self._at, tokens = self._waiting.popleft()
        return tokens

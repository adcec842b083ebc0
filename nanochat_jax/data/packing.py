"""Packing of documents into rows of tokens: BOS-aligned best fit, and a plain token stream.

A packer's state has the position and length of each buffered document, not its tokens. Packing
depends on lengths only, so a restored packer reads and tokenizes a document when a row takes it.
"""

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from nanochat_jax.data.shards import DocumentStream, Position
from nanochat_jax.errors import UsageError

# Makes the JSON-serializable state when called. Deferred, because a snapshot is taken for every
# batch and almost none is used. A snapshot copies one list; Grain's deep copy of a function is
# free.
Snapshot = Callable[[], dict[str, Any]]
Rows = tuple[np.ndarray, np.ndarray]  # inputs, targets: int32 [rows, T]

STATE_CHANGED = (
    "the tokenizer or the texts have changed since this data position was saved: start without it"
)


class TokenizedStream:
    """A `DocumentStream` of int32 token arrays that start with BOS."""

    def __init__(
        self,
        documents: DocumentStream,
        encode: Callable[[pa.ChunkedArray], tuple[np.ndarray, np.ndarray]],
    ):
        """encode: texts -> (ids int32 [N] with BOS before each text, offsets int64 [texts + 1])."""
        self._documents, self._encode, self.seek = documents, encode, documents.seek

    @property
    def position(self) -> Position:
        """Position of the next document."""
        return self._documents.position

    def next_batch(self) -> list[tuple[Position, np.ndarray]]:
        places, texts = self._documents.next_batch()
        return list(zip(places, self._tokens(texts, places[0]), strict=True))

    def load(self, places: list[Position]) -> list[np.ndarray]:
        """Tokens of documents in one row group."""
        return self._tokens(self._documents.load(places), places[0])

    def file_name(self, file: int) -> str:
        return self._documents.reader.paths[file].name

    def file_index(self, name: str) -> int:
        index = self._documents.reader.index.get(name)
        if index is None:
            directory = self._documents.reader.paths[0].parent
            raise UsageError(
                f"the saved data position is in {name}, which is no shard of this split in "
                f"{directory}"
            )
        return index

    def _tokens(self, texts: pa.ChunkedArray, place: Position) -> list[np.ndarray]:
        try:
            ids, offsets = self._encode(texts)
        except ValueError as error:
            path = self._documents.reader.paths[place.file]
            raise UsageError(
                f"row group {place.row_group} of shard {path} cannot be encoded: {error}"
            ) from error
        return [ids[start:stop] for start, stop in pairwise(offsets.tolist())]


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
        found = self.pop_longest(self._entries[0][0])
        assert found is not None
        return found

    def copy_entries(self) -> list[tuple[int, int, Any]]:
        return self._entries.copy()

    @staticmethod
    def by_arrival(entries: list[tuple[int, int, Any]]) -> list[tuple[int, Any]]:
        """(length, item) of `entries` from `copy_entries`, in the order added."""
        return [(length, item) for length, _, item in sorted(entries, key=lambda entry: -entry[1])]


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

    def __init__(self, source: TokenizedStream, sequence_len: int):
        self._source, self._sequence_len = source, sequence_len

    def next_rows(self, count: int) -> Rows:
        raise NotImplementedError

    def snapshot(self) -> Snapshot:
        raise NotImplementedError

    def set_state(self, state: dict[str, Any]) -> None:
        self._source.seek(
            Position(
                **state["position"] | {"file": self._source.file_index(state["position"]["file"])}
            )
        )

    def get_state(self) -> dict[str, Any]:
        return self.snapshot()()

    def place(self) -> dict[str, Any]:
        """The position that the source reads next."""
        return self._to_json(self._source.position)

    def _to_json(self, position: Position) -> dict[str, Any]:
        return position._asdict() | {"file": self._source.file_name(position.file)}


class BestFitPacker(Packer):
    """Rows that start with BOS, without padding; crops documents (upstream since January 2026).

    A row has T+1 tokens. While it has space, it takes the longest buffered document that fits. If
    none fits, it takes the shortest, cropped to the space. Attention crosses document boundaries.

    The buffer has at least `buffer_docs` documents at every choice, unless that would read a third
    pass of the corpus. Documents longer than a row are rarely chosen; in a small corpus, they would
    fill the buffer pass after pass and never be trained on.
    """

    def __init__(self, source: TokenizedStream, sequence_len: int, *, buffer_docs: int = 1000):
        super().__init__(source, sequence_len)
        self._capacity, self._buffer_docs = sequence_len + 1, buffer_docs
        self._clear()

    def next_rows(self, count: int) -> Rows:
        rows = np.empty((count, self._capacity), np.int32)
        for row in rows:
            filled = 0
            while filled < self._capacity:
                self._refill()
                space = self._capacity - filled
                _, (number, place) = self._buffer.pop_longest(space) or self._buffer.pop_shortest()
                piece = self._take(number, place)[:space]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
        return rows[:, :-1], rows[:, 1:]

    def snapshot(self) -> Snapshot:
        position, entries = self._source.position, self._buffer.copy_entries()

        def make() -> dict[str, Any]:
            documents = [(length, place) for length, (_, place) in FitBuffer.by_arrival(entries)]
            files = sorted({place.file for _, place in documents})
            buffer = [
                [p.epoch, files.index(p.file), p.row_group, p.row, length]
                for length, p in documents
            ]
            return {
                "position": self._to_json(position),
                "files": list(map(self._source.file_name, files)),
                "buffer": buffer,
            }

        return make

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._clear()
        files = [self._source.file_index(name) for name in state["files"]]
        for epoch, file, row_group, row, length in state["buffer"]:
            place = Position(epoch, files[file], row_group, row)
            self._unread.setdefault(place[:3], []).append((self._documents, length, place))
            self._add(length, place)

    def _clear(self) -> None:
        self._buffer = FitBuffer()  # items: (number, position)
        self._documents = 0  # documents added so far; each one's number is its key below
        self._per_epoch: Counter[int] = Counter()  # buffered documents of each pass
        self._tokens: dict[int, np.ndarray] = {}
        # Restored documents that are not read yet, by row group: (number, length, position).
        self._unread: dict[tuple[int, ...], list[tuple[int, int, Position]]] = {}

    def _add(self, length: int, place: Position) -> None:
        self._buffer.add(length, (self._documents, place))
        self._documents += 1
        self._per_epoch[place.epoch] += 1

    def _keep(self, number: int, tokens: np.ndarray) -> None:
        # A copy: a view would keep everything that was encoded with it in memory.
        self._tokens[number] = tokens[: self._capacity].copy()

    def _refill(self) -> None:
        while len(self._buffer) < self._buffer_docs:
            if self._per_epoch and self._source.position.epoch > min(self._per_epoch) + 1:
                return
            for place, tokens in self._source.next_batch():
                self._keep(self._documents, tokens)
                self._add(len(tokens), place)

    def _take(self, number: int, place: Position) -> np.ndarray:
        self._per_epoch[place.epoch] -= 1
        if not self._per_epoch[place.epoch]:
            del self._per_epoch[place.epoch]
        if number not in self._tokens:
            # Load all unread documents of the row group: they are likely to be taken soon.
            group = self._unread.pop(place[:3])
            loaded = self._source.load([member for _, _, member in group])
            for (other, length, _), tokens in zip(group, loaded, strict=True):
                if len(tokens) != length:
                    raise UsageError(STATE_CHANGED)
                self._keep(other, tokens)
        return self._tokens.pop(number)


class StreamPacker(Packer):
    """Concatenated documents, cut anywhere (upstream until January 2026), as a `TokenRun`."""

    def __init__(self, source: TokenizedStream, sequence_len: int):
        super().__init__(source, sequence_len)
        self._waiting: deque[tuple[Position, np.ndarray]] = deque()
        self._at = source.position  # position of the run's current document
        self._run = TokenRun(self._next_document)

    def next_rows(self, count: int) -> Rows:
        return self._run.next_rows(count, self._sequence_len)

    def snapshot(self) -> Snapshot:
        position, offset = self._at, self._run.offset
        if offset == len(self._run.piece):
            position, offset = self._waiting[0][0] if self._waiting else self._source.position, 0
        return lambda: {"position": self._to_json(position), "offset": offset}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._waiting.clear()
        self._run = TokenRun(self._next_document)
        if state["offset"]:
            self._run.piece, self._run.offset = self._next_document(), state["offset"]
            if self._run.offset >= len(self._run.piece):
                raise UsageError(STATE_CHANGED)

    def _next_document(self) -> np.ndarray:
        if not self._waiting:
            self._waiting.extend(self._source.next_batch())
        self._at, tokens = self._waiting.popleft()
        return tokens

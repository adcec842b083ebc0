"""Documents into rows of tokens: BOS-aligned best fit, and the plain token stream.

A packer draws documents from a `TokenSource` and remembers where each came from. Its state is therefore a few numbers
per buffered document and never the tokens themselves: a restored packer knows every document's length, which is all
that packing decides by, and reads and tokenizes a document when a row takes it.
"""

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from nanochat_jax.cli import UsageError
from nanochat_jax.data.shards import DocumentStream, Position

# Makes the JSON-able state when called. A function, because a pipeline takes the state of every batch and uses almost
# none: taking one costs a copy of a list, and Grain's deep copy of it costs nothing.
Snapshot = Callable[[], dict[str, Any]]
Rows = tuple[np.ndarray, np.ndarray]  # inputs, targets: int32 [rows, T]

STATE_CHANGED = "the tokenizer or the texts have changed since this data position was saved: start without it"


class TokenSource(Protocol):
    """What a packer draws from: an endless sequence of documents, each an int32 array that starts with BOS."""

    position: Position  # of what comes next

    def next_batch(self) -> list[tuple[Position, np.ndarray]]: ...

    def load(self, places: list[Position]) -> list[np.ndarray]:
        """Documents that lie in one row group."""

    def seek(self, position: Position) -> None: ...

    def file_name(self, file: int) -> str: ...

    def file_index(self, name: str) -> int: ...


class TokenizedStream:
    """A `DocumentStream` tokenized, BOS first."""

    def __init__(self, documents: DocumentStream, encode: Callable[[pa.ChunkedArray], tuple[np.ndarray, np.ndarray]]):
        """encode: texts -> ids int32 [N] with BOS in front of each text, and where each begins, int64 [texts + 1]."""
        self._documents, self._encode = documents, encode

    @property
    def position(self) -> Position:
        return self._documents.position

    def next_batch(self) -> list[tuple[Position, np.ndarray]]:
        places, texts = self._documents.next_batch()
        return list(zip(places, self._tokens(texts, places[0]), strict=True))

    def load(self, places: list[Position]) -> list[np.ndarray]:
        return self._tokens(self._documents.load(places), places[0])

    def seek(self, position: Position) -> None:
        self._documents.seek(position)

    def file_name(self, file: int) -> str:
        return self._documents.reader.paths[file].name

    def file_index(self, name: str) -> int:
        index = self._documents.reader.index.get(name)
        if index is None:
            directory = self._documents.reader.paths[0].parent
            raise UsageError(f"the saved data position is in {name}, which is no shard of this split in {directory}")
        return index

    def _tokens(self, texts: pa.ChunkedArray, place: Position) -> list[np.ndarray]:
        try:
            ids, offsets = self._encode(texts)
        except ValueError as error:
            path = self._documents.reader.paths[place.file]
            raise UsageError(f"row group {place.row_group} of shard {path} cannot be encoded: {error}") from error
        bounds = offsets.tolist()
        return [ids[start:stop] for start, stop in pairwise(bounds)]


class FitBuffer:
    """Items with lengths, taken by length: the longest that fits, or the shortest; the first to arrive on ties.

    Entries lie sorted by (length, -arrival), so both choices are a bisection.
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
        """(length, item) of the longest item of at most `limit`, None if there is none."""
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
        """(length, item) of copied entries in the order of their arrival."""
        return [(length, item) for length, _, item in sorted(entries, key=lambda entry: -entry[1])]


class BestFitPacker:
    """Rows that all start with BOS and have no padding, at the price of cut documents (upstream since January 2026).

    A row has T+1 tokens. As long as it has room, it takes the longest buffered document that fits; if none does, the
    shortest one, of which it keeps what fills the row and throws the rest away. Attention is not blocked where
    documents meet. At least `buffer_docs` documents are in the buffer at every choice, except where that would take
    documents of a third pass over the corpus: documents longer than a row are rarely chosen, and in a small corpus
    they would pile up in the buffer, pass after pass, never to be trained on.
    """

    def __init__(self, source: TokenSource, sequence_len: int, *, buffer_docs: int = 1000):
        self._source, self._capacity, self._buffer_docs = source, sequence_len + 1, buffer_docs
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
        return lambda: self._to_json(position, entries)

    def place(self) -> dict[str, Any]:
        """Where the source reads next."""
        return _position_to_json(self._source.position, self._source)

    def get_state(self) -> dict[str, Any]:
        return self.snapshot()()

    def set_state(self, state: dict[str, Any]) -> None:
        self._source.seek(_position_from_json(state["position"], self._source))
        self._clear()
        files = [self._source.file_index(name) for name in state["files"]]
        for epoch, file, row_group, row, length in state["buffer"]:
            place = Position(epoch, files[file], row_group, row)
            self._unread.setdefault(place[:3], []).append((self._documents, length, place))
            self._add(length, place)

    def _clear(self) -> None:
        self._buffer = FitBuffer()  # of (number, place)
        self._documents = 0  # put into the buffer so far; a document's number is its key below
        self._per_epoch: Counter[int] = Counter()  # buffered documents of each pass
        self._tokens: dict[int, np.ndarray] = {}
        # Documents that are in the buffer since a restore but not read yet: (number, length, place) by row group.
        self._unread: dict[tuple[int, ...], list[tuple[int, int, Position]]] = {}

    def _add(self, length: int, place: Position) -> None:
        self._buffer.add(length, (self._documents, place))
        self._documents += 1
        self._per_epoch[place.epoch] += 1

    def _keep(self, number: int, tokens: np.ndarray) -> None:
        # A copy, as a document can stay for long and would keep all that was encoded together with it.
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
            # What lies together was read together, and is likely to be taken soon: one read serves all of it.
            group = self._unread.pop(place[:3])
            loaded = self._source.load([member for _, _, member in group])
            for (other, length, _), tokens in zip(group, loaded, strict=True):
                if len(tokens) != length:
                    raise UsageError(STATE_CHANGED)
                self._keep(other, tokens)
        return self._tokens.pop(number)

    def _to_json(self, position: Position, entries: list[tuple[int, int, Any]]) -> dict[str, Any]:
        documents = [(length, place) for length, (_, place) in FitBuffer.by_arrival(entries)]
        files = sorted({place.file for _, place in documents})
        index = {file: i for i, file in enumerate(files)}
        return {
            "position": _position_to_json(position, self._source),
            "files": [self._source.file_name(file) for file in files],
            "buffer": [
                [place.epoch, index[place.file], place.row_group, place.row, length] for length, place in documents
            ],
        }


class StreamPacker:
    """Documents end to end, cut anywhere (upstream until January 2026).

    `next_rows(n)` takes n*T+1 tokens: the inputs are the first n*T and the targets the last n*T, row after row, so a
    row's last target is the next row's first input. The token beyond the last input is a target only.
    """

    def __init__(self, source: TokenSource, sequence_len: int):
        self._source, self._sequence_len = source, sequence_len
        self._pieces: deque[tuple[Position, np.ndarray]] = deque()  # whole documents and where they are
        self._offset = 0  # tokens of the first one that are used up

    def next_rows(self, count: int) -> Rows:
        needed = count * self._sequence_len + 1
        flat = np.empty(needed, np.int32)
        filled = 0
        while filled < needed:
            if not self._pieces:
                self._refill()
            _, tokens = self._pieces[0]
            piece = tokens[self._offset : self._offset + needed - filled]
            flat[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._offset += len(piece)
            if self._offset == len(tokens):
                self._pieces.popleft()
                self._offset = 0
        shape = (count, self._sequence_len)
        return flat[:-1].reshape(shape), flat[1:].reshape(shape)

    def snapshot(self) -> Snapshot:
        position, offset = self._pieces[0][0] if self._pieces else self._source.position, self._offset
        return lambda: {"position": _position_to_json(position, self._source), "offset": offset}

    def place(self) -> dict[str, Any]:
        """Where the source reads next."""
        return _position_to_json(self._source.position, self._source)

    def get_state(self) -> dict[str, Any]:
        return self.snapshot()()

    def set_state(self, state: dict[str, Any]) -> None:
        self._source.seek(_position_from_json(state["position"], self._source))
        self._pieces.clear()
        self._offset = state["offset"]
        if self._offset:
            self._refill()
            if self._offset >= len(self._pieces[0][1]):
                raise UsageError(STATE_CHANGED)

    def _refill(self) -> None:
        self._pieces.extend(self._source.next_batch())


def _position_to_json(position: Position, source: TokenSource) -> dict[str, Any]:
    return {
        "epoch": position.epoch,
        "file": source.file_name(position.file),
        "row_group": position.row_group,
        "row": position.row,
    }


def _position_from_json(state: dict[str, Any], source: TokenSource) -> Position:
    return Position(state["epoch"], source.file_index(state["file"]), state["row_group"], state["row"])

"""Documents into rows of tokens: BOS-aligned best fit, and the plain token stream.

A packer draws documents from a stream and remembers where each came from. Its state is therefore a
few numbers per buffered document and never the tokens themselves: a restored packer knows every
document's length, which is all that packing decides by, and reads and tokenizes a document when a
row takes it.
"""

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from nanochat_jax.cli import UsageError
from nanochat_jax.data.shards import DocumentStream, Position

# Makes the JSON-able state when called. A function, because a pipeline takes the state of every
# batch and uses almost none: taking one costs a copy of a list, and Grain's deep copy of it costs
# nothing.
Snapshot = Callable[[], dict[str, Any]]
Rows = tuple[np.ndarray, np.ndarray]  # inputs, targets: int32 [rows, T]

STATE_CHANGED = (
    "the tokenizer or the texts have changed since this data position was saved: start without it"
)


class TokenizedStream:
    """A `DocumentStream` of int32 arrays that start with BOS."""

    def __init__(
        self,
        documents: DocumentStream,
        encode: Callable[[pa.ChunkedArray], tuple[np.ndarray, np.ndarray]],
    ):
        """encode: texts -> ids int32 [N] with BOS in front of each text, and where each begins,
        int64 [texts + 1].
        """
        self._documents, self._encode, self.seek = documents, encode, documents.seek

    @property
    def position(self) -> Position:
        """Of what comes next."""
        return self._documents.position

    def next_batch(self) -> list[tuple[Position, np.ndarray]]:
        places, texts = self._documents.next_batch()
        return list(zip(places, self._tokens(texts, places[0]), strict=True))

    def load(self, places: list[Position]) -> list[np.ndarray]:
        """Documents that lie in one row group."""
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
    """Items with lengths, taken by length: the longest that fits, or the shortest; the first to
    arrive on ties.

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


class TokenRun:
    """Arrays of tokens end to end, cut into rows anywhere."""

    def __init__(self, next_piece: Callable[[], np.ndarray]):
        self._next_piece = next_piece
        # the array at hand, and its tokens that are used up
        self.piece, self.offset = np.empty(0, np.int32), 0

    def next_rows(self, count: int, length: int) -> Rows:
        """Of the next count * length + 1 tokens the inputs are all but the last and the targets
        all but the first, row after row: so a row's last target is the next row's first input, and
        the last token is a target only.
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
    """What both packers share. `set_state` continues after the rows at which a state was taken."""

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
        """Where the source reads next."""
        return self._to_json(self._source.position)

    def _to_json(self, position: Position) -> dict[str, Any]:
        return position._asdict() | {"file": self._source.file_name(position.file)}


class BestFitPacker(Packer):
    """Rows that all start with BOS and have no padding, at the price of cut documents (upstream
    since January 2026).

    A row has T+1 tokens. As long as it has room, it takes the longest buffered document that fits;
    if none does, the shortest one, of which it keeps what fills the row and throws the rest away.
    Attention is not blocked where documents meet. At least `buffer_docs` documents are in the
    buffer at every choice, except where that would take documents of a third pass over the corpus:
    documents longer than a row are rarely chosen, and in a small corpus they would pile up in the
    buffer, pass after pass, never to be trained on.
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
        self._buffer = FitBuffer()  # of (number, place)
        self._documents = 0  # put into the buffer so far; a document's number is its key below
        self._per_epoch: Counter[int] = Counter()  # buffered documents of each pass
        self._tokens: dict[int, np.ndarray] = {}
        # Documents that are in the buffer since a restore but not read yet: (number, length,
        # place) by row group.
        self._unread: dict[tuple[int, ...], list[tuple[int, int, Position]]] = {}

    def _add(self, length: int, place: Position) -> None:
        self._buffer.add(length, (self._documents, place))
        self._documents += 1
        self._per_epoch[place.epoch] += 1

    def _keep(self, number: int, tokens: np.ndarray) -> None:
        # A copy, as a document can stay for long and would keep all that was encoded together with
        # it.
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
            # What lies together was read together, and is likely to be taken soon: one read serves
            # all of it.
            group = self._unread.pop(place[:3])
            loaded = self._source.load([member for _, _, member in group])
            for (other, length, _), tokens in zip(group, loaded, strict=True):
                if len(tokens) != length:
                    raise UsageError(STATE_CHANGED)
                self._keep(other, tokens)
        return self._tokens.pop(number)


class StreamPacker(Packer):
    """Documents end to end, cut anywhere (upstream until January 2026), as a `TokenRun`."""

    def __init__(self, source: TokenizedStream, sequence_len: int):
        super().__init__(source, sequence_len)
        self._waiting: deque[tuple[Position, np.ndarray]] = deque()
        self._at = source.position  # of the document that is the run's piece
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

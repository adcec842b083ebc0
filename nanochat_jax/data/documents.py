"""Tokenized documents of a list of shards, in an order that can be resumed at any document."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.data.shards import open_shard, read_row_group
from nanochat_jax.errors import UsageError

# texts -> (ids int32 [N] with BOS before each text, offsets int64 [texts + 1])
Encode = Callable[[pa.ChunkedArray], tuple[np.ndarray, np.ndarray]]


class ShardReader:
    """Row groups of a list of shards by (file, row group), with an LRU cache of decoded ones.

    Raises `UsageError` at the next access if a shard's size has changed.
    """

    def __init__(self, paths: Sequence[Path], *, cached_row_groups: int = 8):
        self.paths = list(paths)
        self.index = {path.name: i for i, path in enumerate(self.paths)}
        self.sizes = {path.name: path.stat().st_size for path in self.paths}
        self._cached_row_groups = cached_row_groups
        self._row_counts: dict[int, list[int]] = {}
        self._cache: OrderedDict[tuple[int, int], pa.ChunkedArray] = OrderedDict()

    @property
    def directory(self) -> Path:
        return self.paths[0].parent

    def row_counts(self, file: int) -> list[int]:
        """Documents in each row group of a file."""
        if file not in self._row_counts:
            with self._open(file) as parquet:
                groups = map(parquet.metadata.row_group, range(parquet.num_row_groups))
                self._row_counts[file] = [group.num_rows for group in groups]
        return self._row_counts[file]

    def texts(self, file: int, row_group: int, rows: Sequence[int]) -> pa.ChunkedArray:
        """The documents `rows` of a row group. Not copied if `rows` is a range with step 1."""
        key = (file, row_group)
        if key not in self._cache:
            with self._open(file) as parquet:
                self._cache[key] = read_row_group(parquet, self.paths[file], row_group)
            while len(self._cache) > self._cached_row_groups:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        if isinstance(rows, range) and rows.step == 1:
            return self._cache[key].slice(rows.start, len(rows))
        return self._cache[key].take(pa.array(rows, pa.int64()))

    def _open(self, file: int) -> pq.ParquetFile:
        path = self.paths[file]
        parquet = open_shard(path)
        if path.stat().st_size != self.sizes[path.name]:
            raise UsageError(
                f"shard {path} has changed since this run opened it: start again to read the new "
                "one"
            )
        return parquet


class Position(NamedTuple):
    """Position of a document: completed passes, file of the split, row group, row in the group."""

    epoch: int = 0
    file: int = 0
    row_group: int = 0
    row: int = 0


class DocumentStream:
    """The endless sequence of documents of one virtual shard, in file order, as token arrays.

    Virtual shard s of N reads the row groups s, s+N, ... of each file. If a file has fewer row
    groups than N, its documents are divided among the virtual shards one by one.

    `position` is where the search for the next document starts. It has that document's epoch.
    """

    def __init__(self, reader: ShardReader, encode: Encode, shard: int = 0, num_shards: int = 1):
        self._reader, self._encode = reader, encode
        self._shard, self._num_shards = shard, num_shards
        self.seek(Position())

    def next_batch(self, limit: int = 128) -> list[tuple[Position, np.ndarray]]:
        """Positions and tokens of up to `limit` documents, all of one row group."""
        first_epoch = self.position.epoch
        while True:
            at = self.position
            if at.epoch > first_epoch + 1:
                raise self._nothing_to_read("text", "only missing values")
            rows: Sequence[int] = self._rows_left()[:limit]
            texts = self._reader.texts(at.file, at.row_group, rows)
            self.seek(at._replace(row=rows[-1] + 1))
            if texts.null_count:
                rows = [row for row, text in zip(rows, texts, strict=True) if text.is_valid]
                texts = texts.drop_null()
            if rows:
                positions = [at._replace(row=row) for row in rows]
                return list(zip(positions, self._tokens(texts, at), strict=True))

    def load(self, positions: Sequence[Position]) -> list[np.ndarray]:
        """Tokens of documents in one row group."""
        _, file, row_group, _ = positions[0]
        rows = [position.row for position in positions]
        return self._tokens(self._reader.texts(file, row_group, rows), positions[0])

    def seek(self, position: Position) -> None:
        """Continue with the first document of this virtual shard at or after `position`."""
        self.position = position
        started_over = False
        while not self._rows_left():
            at = self.position
            if at.row_group + 1 < len(self._reader.row_counts(at.file)):
                self.position = Position(at.epoch, at.file, at.row_group + 1)
            elif at.file + 1 < len(self._reader.paths):
                self.position = Position(at.epoch, at.file + 1)
            elif not started_over:
                self.position, started_over = Position(at.epoch + 1), True
            else:
                raise self._nothing_to_read("document", "use more text or a smaller batch")

    def file_name(self, file: int) -> str:
        return self._reader.paths[file].name

    def file_index(self, name: str) -> int:
        if name not in self._reader.index:
            raise UsageError(
                f"the saved data position is in {name}, which is not a shard of this split in "
                f"{self._reader.directory}"
            )
        return self._reader.index[name]

    def _rows_left(self) -> range:
        """Rows of this virtual shard from `position` to the end of the row group."""
        at, counts = self.position, self._reader.row_counts(self.position.file)
        if at.row_group >= len(counts):
            return range(0)
        if len(counts) >= self._num_shards:
            mine = at.row_group % self._num_shards == self._shard
            return range(at.row, counts[at.row_group]) if mine else range(0)
        first = sum(counts[: at.row_group]) + at.row
        start = at.row + (self._shard - first) % self._num_shards
        return range(start, counts[at.row_group], self._num_shards)

    def _tokens(self, texts: pa.ChunkedArray, position: Position) -> list[np.ndarray]:
        try:
            ids, offsets = self._encode(texts)
        except ValueError as error:
            raise UsageError(
                f"row group {position.row_group} of shard {self._reader.paths[position.file]} "
                f"cannot be encoded: {error}"
            ) from error
        return [ids[start:stop] for start, stop in pairwise(offsets.tolist())]

    def _nothing_to_read(self, what: str, advice: str) -> UsageError:
        return UsageError(
            f"virtual shard {self._shard} of {self._num_shards} finds no {what} in "
            f"{self._reader.directory}: {advice}"
        )

"""Parquet shards of pretraining text: writing, listing, and reading in a resumable order.

A corpus is a directory of `shard_00000.parquet, shard_00001.parquet, ...` with one string column
`text` in row groups of 1024 documents. The last shard by name is the validation split, the others
are the training split.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.errors import NotFound, UsageError, explaining, one_line
from nanochat_jax.files import is_complete, new_directory, parse_json, write_file
from nanochat_jax.tokenizer import without_surrogates

ROW_GROUP_SIZE = 1024
TEXT_COLUMN = "text"
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
_SCHEMA = pa.schema([(TEXT_COLUMN, pa.string())])


def list_shards(directory: Path | str) -> list[Path]:
    """All shards of a corpus by name. Raises `NotFound` if there are none, `UsageError` if some are
    missing.
    """
    if not is_complete(Path(directory)):
        raise UsageError(
            f"{directory} is being written, or its writing was interrupted: wait, or run the same "
            "`nanochat_jax.dataset` command again"
        )
    paths = sorted(Path(directory).glob("*.parquet"))
    if not paths:
        raise NotFound(
            f"no parquet shards in {directory}: run `python -m nanochat_jax.dataset -n 8` (or "
            "`python -m nanochat_jax.dataset embedded`, without a network) first"
        )
    return paths


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest that `dataset hf` and `dataset local` write; empty for other corpora."""
    path = directory / MANIFEST
    if not path.exists():
        return {}
    with explaining(f"{path} is damaged", "remove the corpus and make it again"):
        manifest = parse_json(path.read_text(encoding="utf-8"))
        for entry in manifest.get("sources", ()):  # fields that callers use unchecked
            if (
                not isinstance(entry["documents"] + entry["skipped"], int)
                or "files" not in entry["source"]
            ):
                raise TypeError(f"{entry!r:.80} is not a source")
            "".join(entry["shards"])
        return manifest


def split_shards(directory: Path | str, split: str) -> list[Path]:
    """The shards of `train` (all but the last by name) or `val` (the last)."""
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    paths = list_shards(directory)
    if len(paths) < 2:
        raise UsageError(
            f"only one shard in {directory} ({paths[0].name}): the last shard is validation, so "
            "training needs at least two; download or write more"
        )
    return paths[:-1] if split == "train" else paths[-1:]


def open_parquet(
    path: Path, column: str, *, foreign: bool = False, **options: Any
) -> pq.ParquetFile:
    """Open a file and check its footer and that `column` holds strings.

    `foreign` also accepts dictionary-encoded and null columns. Raises `UsageError` with the file.
    """
    if not path.exists():
        raise NotFound(f"{path} does not exist")
    what = f"{path} is not a readable parquet file"
    with explaining(what, "delete it and get it again", pa.ArrowException, OSError):
        file = pq.ParquetFile(path, **options)
    if column not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names) or "none"
        advice = ": set `text_field`" if foreign else ""
        raise UsageError(f"{path} has no column {column!r}, only {names}{advice}")
    if (count := file.schema_arrow.names.count(column)) > 1:
        raise UsageError(f"{path} has {count} columns {column!r}: rename or remove all but one")
    type_ = file.schema_arrow.field(column).type
    plain = type_.value_type if foreign and pa.types.is_dictionary(type_) else type_
    if not (
        pa.types.is_string(plain)
        or pa.types.is_large_string(plain)
        or (foreign and pa.types.is_null(plain))
    ):
        raise UsageError(f"column {column!r} of {path} holds {type_}, expected string")
    return file


def open_shard(path: Path) -> pq.ParquetFile:
    return open_parquet(path, TEXT_COLUMN)


def text_size(file: pq.ParquetFile) -> int:
    """Approximate bytes of text in a shard, from its footer."""
    column = file.schema_arrow.names.index(TEXT_COLUMN)
    groups = [file.metadata.row_group(group).column(column) for group in range(file.num_row_groups)]
    # Each text is stored with a length of 4 bytes.
    return max(
        0, sum(group.total_uncompressed_size for group in groups) - 4 * file.metadata.num_rows
    )


def read_row_group(file: pq.ParquetFile, path: Path, row_group: int) -> pa.ChunkedArray:
    what = f"row group {row_group} of shard {path} is corrupt"
    with explaining(what, "delete the file and get it again", pa.ArrowException, OSError):
        return file.read_row_group(row_group, columns=[TEXT_COLUMN], use_threads=False).column(0)


def iter_documents(directory: Path | str, split: str) -> Iterator[str]:
    """Every document of a split once, in file order. Holds one row group in memory."""
    for path in split_shards(directory, split):
        yield from iter_shard(path)


def iter_shard(path: Path) -> Iterator[str]:
    with open_shard(path) as file:
        for row_group in range(file.num_row_groups):
            yield from (
                text
                for text in read_row_group(file, path, row_group).to_pylist()
                if text is not None
            )


def require_text(paths: Sequence[Path], split: str) -> None:
    """Raise `UsageError` unless a document of the shards has text. Stops at the first that has."""
    if not any(text for path in paths for text in iter_shard(path)):
        held = paths[0] if len(paths) == 1 else paths[0].parent
        raise UsageError(f"no document for {split} in {held} has any text: make the corpus again")


class ShardWriter:
    """Writer of one shard, in row groups of 1,024 texts. The file is complete after `close`.

    Raises `UsageError` with the file if writing fails.
    """

    def __init__(self, path: Path):
        self.path, self.num_rows = path, 0
        self._group: list[str] = []
        with self._named():
            self._file = pq.ParquetWriter(
                path,
                _SCHEMA,
                compression="zstd",
                compression_level=3,
                use_dictionary=False,
                write_statistics=False,
            )

    def add(self, text: str) -> None:
        self._group.append(text)
        self.num_rows += 1
        if len(self._group) == ROW_GROUP_SIZE:
            self._flush()

    def close(self) -> None:
        if self._group:
            self._flush()
        with self._named():
            self._file.close()

    def _flush(self) -> None:
        try:
            column = pa.array(self._group, pa.string())
        # JSON can hold unpaired surrogates, which UTF-8 cannot encode.
        except UnicodeEncodeError:
            column = pa.array(map(without_surrogates, self._group), pa.string())
        with self._named():
            self._file.write_table(
                pa.table([column], schema=_SCHEMA), row_group_size=ROW_GROUP_SIZE
            )
        self._group = []

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"cannot write {self.path}: {one_line(error)}") from error


def write_series(
    texts: Iterable[str], directory: Path, *, first: int = 0, rows_per_shard: int | None = None
) -> list[str]:
    """Write texts to shards numbered from `first`; returns the shards' file names."""
    names: list[str] = []
    shard = None
    for text in texts:
        if shard is None:
            names.append(shard_name(first + len(names)))
            shard = ShardWriter(directory / names[-1])
        shard.add(text)
        if shard.num_rows == rows_per_shard:
            shard.close()
            shard = None
    if shard is not None:
        shard.close()
    return names


def write_shards(
    texts: Iterable[str],
    directory: Path | str,
    *,
    val_texts: Iterable[str],
    rows_per_shard: int,
    more: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a corpus atomically; returns the shards' paths.

    Training shards come from `texts`, one validation shard from `val_texts`. `more` maps additional
    file names to contents. Fails if the directory holds files.
    """
    directory = Path(directory)
    with new_directory(directory) as aside:
        names = write_series(texts, aside, rows_per_shard=rows_per_shard)
        last = write_series(val_texts, aside, first=len(names))
        if not names or not last:
            raise UsageError(
                f"no {'validation' if names else 'training'} documents to write to {directory}"
            )
        for name, content in (more or {}).items():
            write_file(aside / name, content)
    return [directory / name for name in names + last]


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"

"""Conversion of documents in any supported format to a corpus of parquet shards.

A converted corpus is a directory of `shard_00000.parquet, ...`, the validation shard
`shard_99999.parquet` (numbered last, so that training shards can be appended) and `manifest.json`,
which lists each source and its document counts.
"""

import contextlib
import csv
import io
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from nanochat_jax.data.shards import (
    MANIFEST,
    ROW_GROUP_SIZE,
    ShardWriter,
    iter_shard,
    open_parquet,
    read_manifest,
    shard_name,
    write_series,
)
from nanochat_jax.errors import NotFound, UsageError, explaining, one_line
from nanochat_jax.files import (
    entries,
    finish_directory,
    locked,
    new_directory,
    parse_json,
    write_file,
)

logger = logging.getLogger(__name__)

VAL_SHARD = shard_name(99_999)
REPORT_EVERY_S = 10.0


def read_documents(path: Path, field: str, cut_chars: int) -> Iterator[str | None]:
    """The documents of one file, read by its extension; None for a row without text.

    `field` is the column of parquet, CSV and TSV files, and the key of JSON Lines. Text files (txt,
    md) are split at paragraph ends into documents of about `cut_chars` characters (0: one
    document). Files ending in .gz, .bz2, .zst or .lz4 are decompressed. Raises `UsageError` with
    the file, and the line number where available.
    """
    if not path.exists():
        raise NotFound(f"{path} does not exist")
    format = file_format(path.name)
    if format is None:
        raise UsageError(f"{path} is not in a supported format: expected {', '.join(FORMATS)}")
    with _named(path):
        if format == "parquet":  # in batches: one row group may hold the whole file
            with open_parquet(
                path, field, foreign=True, buffer_size=1 << 20, pre_buffer=False
            ) as file:
                for batch in file.iter_batches(ROW_GROUP_SIZE, columns=[field], use_threads=False):
                    yield from batch.column(0).to_pylist()
            return
        with open_text(path, newline="") as text:
            if format == "text":
                yield from cut_text(text.read(), cut_chars)
            elif format == "jsonl":
                yield from _read_jsonl(text, path, field)
            else:
                yield from _read_csv(text, path, field, "\t" if format == "tsv" else ",")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise errors of reading a file as `NotFound` or `UsageError` with its path."""
    try:
        yield
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error})") from error
    except FileNotFoundError as error:
        raise NotFound(f"{path} does not exist") from error
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}") from error


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """Open a UTF-8 file, decompressed by its extension, without a byte order mark."""
    with _named(path):
        compression = COMPRESSIONS.get(path.suffix.lower().removeprefix("."))
        with path.open("rb", 1 << 20) as file:
            if compression is not None:
                file = io.BufferedReader(pa.input_stream(file, compression), 1 << 20)
            yield io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


FORMATS = {
    "parquet": "parquet",
    "jsonl": "jsonl",
    "json": "jsonl",
    "ndjson": "jsonl",
    "csv": "csv",
    "tsv": "tsv",
    "txt": "text",
    "md": "text",
}
COMPRESSIONS = {"gz": "gzip", "bz2": "bz2", "zst": "zstd", "lz4": "lz4"}


def file_format(name: str) -> str | None:
    """The format of a file by its extension; None if it is not supported."""
    endings = name.lower().split(".")[1:]
    if endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    return FORMATS.get(endings[-1]) if endings else None


def cut_text(text: str, cut_chars: int) -> Iterator[str]:
    """Pieces of `cut_chars` characters, or as few as half, cut at paragraph, line or word ends."""
    start = 0
    while cut_chars and len(text) - start > cut_chars:
        for border in ("\n\n", "\n", " "):
            stop = text.rfind(border, start + max(1, cut_chars // 2), start + cut_chars)
            if stop != -1:
                break
        else:
            stop = start + cut_chars
        yield text[start:stop].strip()
        start = stop
    yield text[start:].strip()


def _read_jsonl(lines: Iterable[str], path: Path, field: str) -> Iterator[str | None]:
    seen = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with explaining(f"{path} line {number} is not JSON", "expected one object a line"):
            row = parse_json(line)
        if not isinstance(row, dict):
            raise UsageError(
                f"{path} line {number} is a JSON {type(row).__name__}: expected one object a line"
            )
        if not seen and field not in row:
            raise _no_field(path, "key", field, list(row))
        seen = True
        text = row.get(field)
        if text is not None and not isinstance(text, str):
            raise UsageError(
                f"{field!r} in {path} line {number} is {type(text).__name__}, expected a string"
            )
        yield text


def _read_csv(lines: Iterable[str], path: Path, field: str, delimiter: str) -> Iterator[str | None]:
    # Documents can exceed the default limit of 128 KB.
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        names = rows.fieldnames or ()
        if field not in names:
            raise _no_field(path, "column", field, names)
        if list(names).count(field) > 1:
            raise UsageError(
                f"{path} has {list(names).count(field)} columns {field!r}: rename or remove all "
                "but one"
            )
        for row in rows:
            yield row[field]
    except csv.Error as error:
        raise UsageError(f"{path} line {rows.line_num} is not CSV ({error})") from error


def _no_field(path: Path, what: str, field: str, names: Sequence[str]) -> UsageError:
    return UsageError(
        f"{path} has no {what} {field!r}, only {', '.join(names) or 'none'}: set `text_field`"
    )


def write_corpus(
    directory: Path,
    source: dict[str, Any],
    documents: Iterable[str | None],
    *,
    rows_per_shard: int,
    val_fraction: float,
    append: bool = False,
) -> dict[str, Any] | None:
    """Create a corpus of `documents` in `directory`, or add them to the existing corpus.

    `val_fraction` of the documents, evenly spaced and including the first, go to the validation
    shard; those without text are skipped. Returns the manifest entry of the source, or None if the
    corpus already contains it. Raises `UsageError` if there is another corpus and `append` is
    False, or fewer than two documents.
    """
    with locked(directory):
        finish_directory(directory)
        existing = read_manifest(directory).get("sources", [])
        if any(entry["source"] == source for entry in existing):
            return None
        _check_addition(directory, existing, append)
        counts: Counter[str] = Counter()
        with new_directory(directory, add=True) as aside:
            val = ShardWriter(aside / VAL_SHARD)
            for text in iter_shard(directory / VAL_SHARD) if existing else ():
                val.add(text)
            numbers = [int(name[6:11]) for entry in existing for name in entry["shards"]]
            names = write_series(
                _train_documents(documents, val, val_fraction, counts),
                aside,
                first=1 + max(numbers, default=-1),
                rows_per_shard=rows_per_shard,
            )
            val.close()
            if not names:
                content = "only one document" if counts["documents"] else "no text"
                raise UsageError(
                    f"{describe(source)} holds {content}: a corpus needs two documents, one to "
                    "train on and one for validation"
                )
            entry = {
                "source": source,
                **counts,
                "skipped": counts["rows"] - counts["documents"],
                "shards": names,
            }
            sources = [*existing, entry]
            write_file(aside / MANIFEST, json.dumps({"sources": sources}, indent=1) + "\n")
    return entry


def _check_addition(directory: Path, existing: list[dict[str, Any]], append: bool) -> None:
    """Raise `UsageError` unless the corpus with the sources `existing` may be added to."""
    if existing and not append:
        names = ", ".join(describe(entry["source"]) for entry in existing)
        raise UsageError(
            f"{directory} already holds {names}: set `append` to add to it, or delete the directory"
        )
    if not existing and directory.exists() and entries(directory):
        raise UsageError(f"{directory} holds files of another origin: move them away first")
    for name in (name for entry in existing for name in entry["shards"]):
        if not (directory / name).is_file():
            raise NotFound(
                f"{directory / name} is missing, but the manifest lists it: restore it, or make "
                "the corpus again"
            )


def _train_documents(
    documents: Iterable[str | None], val: ShardWriter, val_fraction: float, counts: Counter[str]
) -> Iterator[str]:
    """The training documents. Writes the others to `val`, and counts all in `counts`."""
    last_report = time.monotonic()
    for text in documents:
        counts["rows"] += 1
        if time.monotonic() - last_report > REPORT_EVERY_S:
            last_report = time.monotonic()
            logger.info("%s documents so far", f"{counts['documents']:,}")
        if text is None or not text.strip():
            continue
        index = counts["documents"]
        counts["documents"] += 1
        if index == 0 or int(index * val_fraction) > int((index - 1) * val_fraction):
            counts["val_documents"] += 1
            val.add(text)
        else:
            yield text


def describe(source: dict[str, Any]) -> str:
    """One-line description of a source."""
    if "dataset" not in source:
        names = [file["name"] for file in source["files"]]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more files"
    subset = f"{source['subset']}, " if source["subset"] else ""
    return f"{source['dataset']} ({subset}{source['split']}) at {source['revision'][:10]}"

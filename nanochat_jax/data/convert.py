"""Documents of any origin into a corpus of our shards, one at a time, however many there are.

A corpus made here is a directory of `shard_00000.parquet, ...`, the validation shard `shard_99999.parquet` (so that
more training shards can come before it) and `manifest.json`, which names the sources and counts their documents.
"""

import csv
import io
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.utils import WeakFileLock

from nanochat_jax.cli import NotFound, UsageError
from nanochat_jax.data.shards import (
    MANIFEST,
    ROW_GROUP_SIZE,
    ShardWriter,
    fsync,
    iter_shard,
    read_manifest,
    shard_name,
    write_series,
)

logger = logging.getLogger(__name__)

VAL_SHARD = shard_name(99_999)
REPORT_EVERY_S = 10.0

# ---------------------------------------------------------------------------------------------------- reading


def read_documents(path: Path, field: str, cut_chars: int) -> Iterator[str | None]:
    """The documents of one file, by its ending; None where a row has no text.

    `field` names the column of parquet, csv and tsv files, and the key of JSON Lines. A text file (txt, md) is cut
    where a paragraph ends into documents of about `cut_chars` characters (0: it is one document). Endings .gz, .bz2,
    .zst and .lz4 are unpacked. Raises `UsageError` naming the file, and the line if there are lines.
    """
    if not path.exists():
        raise NotFound(f"{path} does not exist")
    kind = file_format(path.name)
    if kind is None:
        raise UsageError(f"{path} is of no known kind: expected an ending of {', '.join(FORMATS)}")
    if kind == "parquet":
        yield from _read_parquet(path, field)
        return
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            text = io.TextIOWrapper(io.BufferedReader(stream, 1 << 20), encoding="utf-8-sig", newline="")
            if kind == "text":
                yield from cut_text(text.read(), cut_chars)
            elif kind == "jsonl":
                yield from _read_jsonl(text, path, field)
            else:
                yield from _read_csv(text, path, field, "\t" if kind == "tsv" else ",")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error})") from error
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


FORMATS = {"parquet": "parquet", "jsonl": "jsonl", "json": "jsonl", "ndjson": "jsonl", "csv": "csv", "tsv": "tsv",
           "txt": "text", "md": "text"}  # fmt: skip
COMPRESSIONS = ("gz", "bz2", "zst", "lz4")


def file_format(name: str) -> str | None:
    """The kind of a file by its ending, None if there is no reader for it."""
    endings = name.lower().split(".")[1:]
    if endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    return FORMATS.get(endings[-1]) if endings else None


def cut_text(text: str, cut_chars: int) -> Iterator[str]:
    """Pieces of `cut_chars` characters or as little as half of it, to end where a paragraph, a line or a word does."""
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


def _read_parquet(path: Path, field: str) -> Iterator[str | None]:
    try:
        # Read in pieces: a row group may be the whole file, of any size.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            if field not in file.schema_arrow.names:
                raise _no_field(path, "column", field, file.schema_arrow.names)
            kind = file.schema_arrow.field(field).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
                raise UsageError(f"column {field!r} of {path} holds {kind}, expected string")
            for batch in file.iter_batches(ROW_GROUP_SIZE, columns=[field], use_threads=False):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]})") from error


def _read_jsonl(lines: Iterable[str], path: Path, field: str) -> Iterator[str | None]:
    seen = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path} line {number} is not JSON ({error}): expected one object a line") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path} line {number} is a JSON {type(row).__name__}: expected one object a line")
        if not seen and field not in row:
            raise _no_field(path, "key", field, list(row))
        seen = True
        text = row.get(field)
        if text is not None and not isinstance(text, str):
            raise UsageError(f"{field!r} in {path} line {number} is {type(text).__name__}, expected a string")
        yield text


def _read_csv(lines: Iterable[str], path: Path, field: str, delimiter: str) -> Iterator[str | None]:
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)  # a document is longer than 128 KB at times
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        if field not in (rows.fieldnames or ()):
            raise _no_field(path, "column", field, rows.fieldnames or ())
        for row in rows:
            yield row[field]
    except csv.Error as error:
        raise UsageError(f"{path} line {rows.line_num} is not CSV ({error})") from error


def _no_field(path: Path, kind: str, field: str, names: Sequence[str]) -> UsageError:
    found = ", ".join(names) or "none"
    return UsageError(f"{path} has no {kind} {field!r}, only {found}: name the text with --text-field")


# ---------------------------------------------------------------------------------------------------- writing


def write_corpus(
    directory: Path,
    source: dict[str, Any],
    documents: Callable[[], Iterable[str | None]],
    *,
    rows_per_shard: int,
    val_fraction: float,
    append: bool = False,
) -> dict[str, Any] | None:
    """Make `directory` a corpus of `documents()`, or add them to the corpus that is there.

    Each training shard has `rows_per_shard` documents, the last what is left. Evenly spread, `val_fraction` of the
    documents go to the validation shard, the first one always. Those without a text (missing, empty, or white space
    alone) are skipped. Everything is written aside first: the corpus changes by renames at the end, and what an
    interrupted run left behind is undone by the next.

    Returns the manifest's entry of the source, or None if the corpus holds this very source already.
    Raises `UsageError` if another corpus is there and `append` is not given, or if there are not two documents.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(directory.with_name(f".{directory.name}.lock")):
        manifest = read_manifest(directory)
        if manifest:
            _undo_interrupted(directory, manifest)
        elif directory.exists() and any(directory.iterdir()):
            raise UsageError(f"{directory} holds files of another origin: move them away first")
        if any(entry["source"] == source for entry in manifest.get("sources", ())):
            return None
        if manifest and not append:
            held = ", ".join(describe(entry["source"]) for entry in manifest["sources"])
            raise UsageError(f"{directory} holds {held} already: --append adds to it; or remove the directory")
        aside = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            entry = _write_aside(aside, directory, manifest, source, documents(), rows_per_shard, val_fraction)
            sources = [*manifest.get("sources", ()), entry]
            if manifest:
                _add(directory, manifest, aside, entry)
                _write_manifest(directory, {"sources": sources})
            else:
                _write_manifest(aside, {"sources": sources})
                if directory.exists():
                    directory.rmdir()
                aside.rename(directory)
                fsync(directory.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return entry


def describe(source: dict[str, Any]) -> str:
    """A source in a few words."""
    if "dataset" not in source:
        names = [file["name"] for file in source["files"]]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more files"
    subset = f"{source['subset']}, " if source["subset"] else ""
    return f"{source['dataset']} ({subset}{source['split']}) at {source['revision'][:10]}"


def _write_aside(
    aside: Path,
    directory: Path,
    manifest: dict[str, Any],
    source: dict[str, Any],
    documents: Iterable[str | None],
    rows_per_shard: int,
    val_fraction: float,
) -> dict[str, Any]:
    before = manifest.get("sources", [])
    rows = kept = num_val = 0
    val = ShardWriter(aside / VAL_SHARD)
    for text in _first_val(directory, before):
        val.add(text)

    def training() -> Iterator[str]:
        nonlocal rows, kept, num_val
        last_report = time.monotonic()
        for text in documents:
            rows += 1
            if text is not None and text.strip():
                kept += 1
                if kept == 1 or int((kept - 1) * val_fraction) > int((kept - 2) * val_fraction):
                    num_val += 1
                    val.add(text)
                else:
                    yield text
            if time.monotonic() - last_report > REPORT_EVERY_S:
                last_report = time.monotonic()
                logger.info("%s documents so far", f"{kept:,}")

    first = 1 + max((int(name[6:11]) for entry in before for name in entry["shards"]), default=-1)
    names = write_series(training(), aside, first=first, full=lambda shard: shard.num_rows == rows_per_shard)
    val.close()
    if not names:
        raise UsageError(f"{describe(source)} has {kept} documents with text in {rows} rows: a corpus needs two, "
                         "one to train on and one for validation")  # fmt: skip
    return {"source": source, "rows": rows, "documents": kept, "skipped": rows - kept, "val_documents": num_val,
            "shards": names}  # fmt: skip


def _first_val(directory: Path, sources: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The validation documents of finished sources."""
    count = sum(entry["val_documents"] for entry in sources)
    if count:
        for number, text in enumerate(iter_shard(directory / VAL_SHARD)):
            if number == count:
                return
            yield text


def _add(directory: Path, manifest: dict[str, Any], aside: Path, entry: dict[str, Any]) -> None:
    """Move new shards in. While that goes on the manifest says so, and loaders refuse the corpus."""
    _write_manifest(directory, manifest | {"appending": entry["shards"]})
    for name in (*entry["shards"], VAL_SHARD):
        os.replace(aside / name, directory / name)
    fsync(directory)


def _undo_interrupted(directory: Path, manifest: dict[str, Any]) -> None:
    if "appending" not in manifest:
        return
    for name in manifest["appending"]:
        (directory / name).unlink(missing_ok=True)
    repaired = directory / f".{VAL_SHARD}.partial"
    val = ShardWriter(repaired)
    for text in _first_val(directory, manifest["sources"]):
        val.add(text)
    val.close()
    os.replace(repaired, directory / VAL_SHARD)
    del manifest["appending"]
    _write_manifest(directory, manifest)
    logger.warning("removed from %s what an interrupted --append had half added", directory)


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    aside = directory / f".{MANIFEST}.partial"
    aside.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    fsync(aside)
    os.replace(aside, directory / MANIFEST)
    fsync(directory)

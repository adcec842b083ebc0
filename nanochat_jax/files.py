"""Files and directories on the disk that are there whole or not at all, and files from the web."""

import contextlib
import hashlib
import http.client
import json
import logging
import os
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat_jax.cli import NotFound

logger = logging.getLogger(__name__)

ATTEMPTS = 3
TIMEOUT_S = 30.0  # without a byte


def parse_json(text: str | bytes, **options: Any) -> Any:
    """The value of a JSON text, by `json.loads`. Raises ValueError for everything else, deep nesting included."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: str | bytes) -> None:
    """Write aside, then rename: a reader sees the old file or the new one. The directory is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(directory: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty directory aside, which takes the name of `directory` at the end of the block, with all files on the disk.

    After an exception nothing of it is left. What a killed process left is removed by the next, so those that may write
    the same at the same time need a lock (`locked`). If `directory` is there by then and not empty, OSError is raised, or
    it is removed if `replace` says so; killed right between, `undo_replacement` brings it back.
    """
    aside = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            fsync(path)
        if replace and directory.exists():
            undo_replacement(directory)
            directory.rename(_replaced(directory))
        aside.rename(directory)
        fsync(directory.parent)
        shutil.rmtree(_replaced(directory), ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def undo_replacement(directory: Path) -> None:
    """After a replacement that was killed: back to the old if the new is not in its place, else rid of the old."""
    if not directory.exists() and _replaced(directory).exists():
        _replaced(directory).rename(directory)
    shutil.rmtree(_replaced(directory), ignore_errors=True)


def _replaced(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.replaced")


def locked(path: Path) -> contextlib.AbstractContextManager:
    """Of all processes that want to make `path`, one at a time."""
    from huggingface_hub.utils import WeakFileLock  # here, as few need it and it takes a while to import

    path.parent.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(path.with_name(f".{path.name}.lock"))


def fetch_file(url: str, path: Path, *, sha256: str | None = None) -> Path:
    """`path`, unless it exists downloaded from `url`, whole, and with the checksum `sha256` if that is given.

    Raises `NotFound`, naming both, if it cannot be had.
    """
    if path.exists():
        return path
    logger.info("fetching %s", url)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, aside.open("wb") as file:
                    shutil.copyfileobj(response, file)
                    size, expected = file.tell(), response.headers.get("Content-Length")
                if expected is not None and size != int(expected):
                    raise OSError(f"the connection ended after {size} of {expected} bytes")
                if sha256 is not None:
                    with aside.open("rb") as file:
                        found = hashlib.file_digest(file, "sha256").hexdigest()
                    if found != sha256:
                        raise OSError(f"its checksum is {found}, expected {sha256}")
                fsync(aside)
                aside.replace(path)
                return path
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                logger.warning("attempt %d of %d to fetch %s failed: %s", attempt, ATTEMPTS, url, error)
                failure = error
    finally:
        aside.unlink(missing_ok=True)
    raise NotFound(f"{path} does not exist and could not be fetched from {url} ({failure}): "
                   "put the file there, or run where the network can be reached")

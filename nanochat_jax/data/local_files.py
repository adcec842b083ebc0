"""The files of a local corpus: found in directories, listed once, and identified by checksums."""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nanochat_jax.data.convert import FORMATS, file_format
from nanochat_jax.errors import NotFound, UsageError

logger = logging.getLogger(__name__)


def expand(names: Sequence[str]) -> Iterator[Path]:
    """The given files, and files of supported formats in given directories."""
    for path in map(Path, names):
        if not path.is_dir():
            yield path
            continue
        inside, skipped = _search(path)
        if skipped:
            logger.warning(
                "%s: %d hidden entries, linked directories and files of other formats are skipped: "
                "%s",
                path,
                len(skipped),
                ", ".join(skipped[:5]) + ", ..." * (len(skipped) > 5),
            )
        if not inside:
            raise UsageError(f"{path} holds no file of a supported format ({', '.join(FORMATS)})")
        yield from sorted(inside)


def _search(directory: Path) -> tuple[list[Path], list[str]]:
    """(files to read, entries to skip) below a directory."""
    inside, skipped = list[Path](), list[str]()
    for folder, folders, files in os.walk(directory, onerror=_raise):
        linked = {name for name in folders if Path(folder, name).is_symlink()}
        hidden = {name for name in (*folders, *files) if name.startswith(".")}
        folders[:] = sorted({*folders} - linked - hidden)
        readable = {
            name for name in {*files} - hidden if file_format(name) and Path(folder, name).is_file()
        }
        inside += [Path(folder, name) for name in readable]
        others = {*files} | linked | hidden
        skipped += [str(Path(folder, name)) for name in sorted(others - readable)]
    return inside, skipped


def _raise(error: OSError) -> NoReturn:
    raise error


def without_repetitions(paths: Iterable[Path]) -> Iterator[Path]:
    """Each file once, even if given repeatedly or under other names. Logs repetitions."""
    seen: dict[Any, Path] = {}
    for path in paths:
        status = path.stat() if path.exists() else None  # follows links
        key = status and (status.st_dev, status.st_ino)
        first = seen.setdefault(key, path)
        if key and first is not path:
            logger.warning("%s is the file %s again: it is read once", path, first)
        else:
            yield path


def sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error

"""Atomic writes of files and directories, locks, and downloads."""

import contextlib
import hashlib
import http.client
import itertools
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat_jax.errors import NotFound, UsageError, naming

try:
    import fcntl
except ImportError:  # Windows, where only inference runs
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

ATTEMPTS = 3
TIMEOUT_S = 30.0  # longest wait for a byte
LOCK = ".lock"  # in a directory that only one run at a time may write to
PARTIAL, COMPLETE = ".partial", ".complete"  # subdirectories used by `new_directory`


def parse_json(text: str | bytes, **options: Any) -> Any:
    """The value of a JSON text. Raises ValueError for invalid text, too deep nesting included."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    windows = os.name == "nt"  # which syncs only files that are open for writing
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> Path:
    """Create `directory` if missing and check that it is writable; returns it.

    Links to directories and mount points are used as they are. Call this before the work whose
    result goes there. Raises `UsageError`.
    """
    create_directory(directory)
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise _refused(directory, error) from error
    return directory


def create_directory(directory: Path) -> None:
    """Create a directory and its parents if missing. Raises `UsageError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        existing = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
        if existing.is_dir():
            raise _refused(directory, error) from error
        if existing.is_symlink():
            raise UsageError(
                f"{existing} is a link to {os.readlink(existing)}, which is not a directory: "
                "create or mount that, or remove the link"
            ) from error
        raise UsageError(
            f"{existing} is a file where a directory is needed: move it away, or choose another "
            "directory"
        ) from error


def _refused(directory: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write to {directory}: {error.strerror}; fix that, or choose another directory"
    )


def write_file(path: Path, content: str | bytes) -> None:
    """Write to a temporary file, then rename it: readers see the old content or the new.

    The directory is created if missing. A link to a file stays a link.
    """
    path = Path(os.path.realpath(path))
    create_directory(path.parent)
    with _temporary(path) as temporary, naming(path):
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A path next to `path`, renamed to it if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(directory: Path, *, add: bool = False) -> Iterator[Path]:
    """A temporary directory inside `directory`; at the end of the block its files move up.

    `directory` is created if missing. Otherwise it is filled in place, so it may be a link, a mount
    point or the working directory. It must be empty (see `entries`) unless `add` is given: then new
    files are added and files of the same name are replaced.

    After an exception nothing of the block remains. The result is complete once `.partial` is
    renamed to `.complete`. If the process is killed between this and the last move, `is_complete`
    returns False and `finish_directory` makes the remaining moves. Raises `UsageError` before the
    block if `directory` is not writable or another process is writing to it.
    """
    created = not directory.exists()
    make_directory(directory)
    partial = directory / PARTIAL
    with _only_writer(directory):
        try:
            finish_directory(directory)
            _check_empty(directory, add)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            for path in (*partial.rglob("*"), partial):
                fsync(path)
            _check_empty(directory, add)
            partial.rename(directory / COMPLETE)
            finish_directory(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if created:
                with contextlib.suppress(OSError):  # not empty: the block succeeded
                    directory.rmdir()


def entries(directory: Path) -> list[Path]:
    """The content of a directory, without hidden files and a new file system's `lost+found`."""
    return [
        path for path in directory.iterdir() if path.name[0] != "." and path.name != "lost+found"
    ]


def _check_empty(directory: Path, add: bool) -> None:
    if not add and (content := entries(directory)):
        raise UsageError(
            f"{directory} is not an empty directory (it holds {content[0].name}): choose a new or "
            "an empty one"
        )


def is_complete(directory: Path) -> bool:
    """Whether no `new_directory` was interrupted while its files moved."""
    return not (directory / COMPLETE).exists()


def finish_directory(directory: Path) -> None:
    """Make the remaining moves of an interrupted `new_directory`.

    The largest file moves last: without its weights, no program loads an incomplete model.
    """
    complete = directory / COMPLETE
    if is_complete(directory):
        return
    for path in sorted(complete.iterdir(), key=lambda path: path.stat().st_size):
        path.replace(directory / path.name)
    fsync(directory)
    complete.rmdir()


def set_aside(directory: Path, name: str) -> Path | None:
    """Move the content of a directory (see `entries`) to `<name>-<number>` in it, and return that.

    None if there is nothing. The directory itself stays: it may be a link or a mount point.
    """
    content = entries(directory) if directory.is_dir() else []
    if not content:
        return None
    target = _first_free(directory / f"{name}-{number}" for number in itertools.count())
    target.mkdir()
    for path in sorted(content, key=lambda path: not path.name.isdigit()):
        path.rename(target / path.name)  # steps first, then the tokenizer they need
    return target


def _first_free(paths: Iterator[Path]) -> Path:
    return next(path for path in paths if not os.path.lexists(path))


def empty_directory(directory: Path) -> None:
    """Delete the content of a directory, renamed first."""
    set_aside(directory, ".deleted")
    for path in directory.glob(".deleted-*"):
        shutil.rmtree(path)


def keep_old(path: Path) -> Path | None:
    """Rename a file that is about to be overwritten, if it exists; returns its new name."""
    if not os.path.lexists(path):
        return None
    names = (f"{path.stem}.old-{number}{path.suffix}" for number in itertools.count(1))
    return path.rename(_first_free(path.with_name(name) for name in names))


@contextlib.contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    if fcntl is None:  # Windows cannot open a directory
        with naming(directory):
            yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if try_lock(descriptor) is False:
            raise UsageError(
                f"another process is writing to {directory}: wait for it, or choose another "
                "directory"
            )
        with naming(directory):
            yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed or this process ends.

    False if another process holds the lock, None if the file system or Windows has no such locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def lock_file(path: Path, name: str, advice: str) -> Iterator[None]:
    """Hold a lock on `path` while the block runs; a crash releases it.

    Raises `UsageError`, with `name` and the other process, if another process holds it.
    """
    make_directory(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):
            path.chmod(0o666)  # other users with write access must be able to lock it
        locked = try_lock(descriptor)
        if locked is False:
            owner = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            raise UsageError(f"{name} is in use by {owner or 'another process'}: {advice}")
        if locked is None:
            logger.warning(
                "%s is on a file system without locks: make sure that no second process "
                "writes to it",
                path.parent,
            )
            yield
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, describe_process().encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def describe_process() -> str:
    """This process in one line: its id, host and command."""
    command = " ".join(" ".join(["python", *sys.orig_argv[1:]]).split())[:200]
    return f"process {os.getpid()} on {socket.gethostname()} ({command})"


def locked(path: Path) -> contextlib.AbstractContextManager:
    """A lock, so that only one process at a time makes `path`; others wait."""
    # takes a while to import
    from huggingface_hub.utils import WeakFileLock

    make_directory(path.parent)
    return WeakFileLock(path.with_name(f".{path.name}.lock"))


def fetch_file(url: str, path: Path, *, sha256: str | None = None) -> Path:
    """`path`, downloaded from `url` if missing: complete, and with the checksum `sha256` if given.

    Raises `NotFound`, with both, if the download fails.
    """
    if path.exists():
        return path
    logger.info("fetching %s", url)
    make_directory(path.parent)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _temporary(path) as temporary:
                _download(url, temporary, sha256)
            return path
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            logger.warning("attempt %d of %d to fetch %s failed: %s", attempt, ATTEMPTS, url, error)
            failure = error
    raise NotFound(
        f"{path} does not exist and could not be fetched from {url} ({failure}): "
        "put the file there, or run where the network can be reached"
    )


def _download(url: str, path: Path, sha256: str | None) -> None:
    """Download a file. Raises OSError if it is incomplete or has another checksum."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, path.open("wb") as file:
        shutil.copyfileobj(response, file)
        size, expected = file.tell(), response.headers.get("Content-Length")
    if expected is not None and size != int(expected):
        raise OSError(f"the connection ended after {size} of {expected} bytes")
    if sha256 is not None:
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        if checksum != sha256:
            raise OSError(f"its checksum is {checksum}, expected {sha256}")

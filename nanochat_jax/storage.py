"""Checkpoints in Google Cloud Storage: what Orbax does not do itself.

Cloud Storage has neither directories nor renames. A step is complete if it has a marker object,
which Orbax writes last. So markers are copied last and deleted first, and an interrupted operation
leaves no partial step that looks complete.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from nanochat_jax.errors import UsageError, explaining, one_line
from nanochat_jax.files import describe_process

if TYPE_CHECKING:  # imported on use: most commands need no bucket
    from etils import epath

# the marker; each item of a step has one too, and the step's own is written last
COMMITTED = "commit_success.txt"

HEARTBEAT_S, EXPIRY_S = 30.0, 150.0  # see `ObjectLock`

log = logging.getLogger(__name__)

Directory: TypeAlias = Union[Path, "epath.Path"]  # a tag's: on a disk, or in a bucket


def is_remote(directory: Directory) -> bool:
    return str(directory).startswith("gs://")


@functools.cache
def open_bucket(url: str) -> epath.Path:
    """The path `url` (gs://bucket/...). Raises `UsageError` if the bucket cannot be reached."""
    advice = "pip install 'nanochat-jax[gcs]'"
    with explaining(f"checkpoints in {url} need gcsfs", advice, ImportError):
        import fsspec
        import gcsfs  # noqa: F401  (required by fsspec)
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY
    # Other processes and TensorStore change the listings.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    # otherwise etils uses TensorFlow's file system if TensorFlow is installed
    os.environ.setdefault("EPATH_USE_TF", "0")
    name = url.removeprefix("gs://").split("/")[0]
    try:
        storage.Client().get_bucket(name, timeout=20, retry=DEFAULT_RETRY.with_timeout(20))
    except Exception as error:  # any error of the network, the credentials or the bucket
        raise UsageError(
            f"{url} cannot be reached ({type(error).__name__}: {one_line(error)}): check the "
            "bucket's name, the network and that this machine's account may read the bucket and "
            "write objects (outside of Google Cloud: `gcloud auth application-default login`)"
        ) from error
    from etils import epath

    return epath.Path(url)


def _file_system() -> Any:
    import fsspec

    return fsspec.filesystem("gcs")


def _objects(directory: epath.Path) -> tuple[list[str], list[str]]:
    """(markers under a path, inner ones last; all other objects), by name."""
    names = _file_system().find(str(directory))
    marks = [name for name in names if name.endswith(f"/{COMMITTED}")]
    return sorted(marks, key=lambda name: name.count("/")), [
        name for name in names if name not in set(marks)
    ]


def delete(directory: epath.Path) -> None:
    marks, others = _objects(directory)
    for names in (*([mark] for mark in marks), others):
        if names:
            _file_system().rm(names)


def move(directory: epath.Path, target: epath.Path) -> None:
    """Rename a directory, by copies inside the bucket."""
    marks, others = _objects(directory)
    start, new = str(directory).removeprefix("gs://"), str(target).removeprefix("gs://")
    for names in (others, *([mark] for mark in reversed(marks))):
        if names:
            _file_system().copy(names, [new + name.removeprefix(start) for name in names])
    delete(directory)


def copy_files(source: Directory, target: Directory) -> None:
    """Copy the small files of a directory to or from a bucket."""
    if not is_remote(target):
        target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


class ObjectLock:
    """An object next to a tag's directory that names the run which writes to it.

    It is created only if it does not exist, and rewritten every `HEARTBEAT_S` seconds. A crashed
    run's lock is taken over if its process was on this machine and is gone, or `EXPIRY_S` seconds
    after its last heartbeat. `lost` is set in an owner whose lock was taken over.
    """

    def __init__(self, directory: epath.Path, advice: str) -> None:
        from google.cloud import storage

        name, _, parent = str(directory.parent).removeprefix("gs://").partition("/")
        self._directory, self._advice, self._id = directory, advice, uuid.uuid4().hex
        self._bucket = storage.Client().bucket(name)
        self._key = f"{parent}/.{directory.name}.lock"
        self._generation, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.lost = False

    def __enter__(self) -> ObjectLock:
        advice = "check that this machine's account may write objects there"
        # any error of the network or the bucket
        with explaining(f"{self._directory} cannot be locked", advice, Exception):
            self._acquire()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join(timeout=30)
        try:
            self._bucket.blob(self._key).delete(if_generation_match=self._generation)
        except Exception as error:  # it expires
            log.warning("the lock of %s was not deleted (%s)", self._directory, one_line(error))

    def _acquire(self) -> None:
        generation, holder = 0, dict[str, Any]()  # generation 0: the object must not exist
        for _ in range(10):
            if self._write(generation):
                return
            generation, holder = self._read()  # it exists, or another process was faster
            if holder and not _is_gone(holder):
                break
        raise UsageError(
            f"{self._directory} is in use by {holder.get('process', 'another process')}: "
            f"{self._advice}"
        )

    def _write(self, generation: int) -> bool:
        """Write the object if its generation is this (0: none); whether this process owns it."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._key)
        holder = {
            "id": self._id,
            "process": describe_process(),
            "machine": _machine(),
            "pid": os.getpid(),
            "expires": time.time() + EXPIRY_S,
        }
        try:
            blob.upload_from_string(json.dumps(holder), if_generation_match=generation, timeout=20)
            self._generation = blob.generation
            return True
        # also if the write succeeded but its response was lost and the client retried
        except PreconditionFailed:
            generation, holder = self._read()
            if holder.get("id") == self._id:
                self._generation = generation
            return holder.get("id") == self._id

    def _read(self) -> tuple[int, dict[str, Any]]:
        """Generation and content of the object; (0, {}) if it does not exist."""
        from google.api_core.exceptions import NotFound

        blob = self._bucket.get_blob(self._key)
        try:
            return (blob.generation, _parse_holder(blob.download_as_bytes())) if blob else (0, {})
        except NotFound:  # deleted meanwhile
            return 0, {}

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                if not self._write(self._generation):
                    self.lost = True
                    return
            except Exception as error:  # a network error may be temporary
                log.warning("the lock of %s was not renewed (%s)", self._directory, one_line(error))


def _parse_holder(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
        return holder if holder["expires"] + 0.0 else {}
    except (ValueError, TypeError, KeyError):  # not a lock of this project: like an expired one
        return {}


def _is_gone(holder: dict[str, Any]) -> bool:
    if holder["expires"] < time.time():
        return True
    if holder.get("machine") != _machine():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it exists, and is another user's
        return False
    return holder["pid"] == os.getpid()  # if equal, an earlier process with this id left it


def _machine() -> str:
    """This host and its process namespace, in which a process id is unique."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()

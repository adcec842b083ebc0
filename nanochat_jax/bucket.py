"""Checkpoints in a bucket of Google Cloud Storage: what they need beside what Orbax does itself.

A bucket knows neither directories nor renames. What makes a step whole there is an object that Orbax writes last; so
whatever is moved or deleted has it copied last and deleted first, and an interruption leaves no half that looks whole.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

from nanochat_jax.cli import UsageError, one_line

if TYPE_CHECKING:  # imported where it is needed: most commands have nothing to do with a bucket
    from etils import epath

COMMITTED = "commit_success.txt"  # the object; each item of a step has one too, the step's own comes after them

Directory: TypeAlias = Union[Path, "epath.Path"]  # of a tag: on a disk, or in a bucket


def is_remote(directory: Directory) -> bool:
    return str(directory).startswith("gs://")


@functools.cache
def open_bucket(url: str) -> epath.Path:
    """The place `url` (gs://bucket/...). Raises `UsageError` if the bucket cannot be reached."""
    try:
        import fsspec
        import gcsfs  # noqa: F401  (what fsspec looks for)
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY
    except ImportError as error:
        raise UsageError(f"checkpoints in {url} need gcsfs ({error}): pip install 'nanochat-jax[gcs]'") from error
    # Listings change under us, by the other processes' and TensorStore's hands.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    os.environ.setdefault("EPATH_USE_TF", "0")  # etils takes TensorFlow's file system where TensorFlow is installed
    name = url.removeprefix("gs://").split("/")[0]
    try:
        storage.Client().get_bucket(name, timeout=20, retry=DEFAULT_RETRY.with_timeout(20))
    except Exception as error:  # whatever the network, the credentials or the bucket say
        raise UsageError(f"{url} cannot be reached ({type(error).__name__}: {one_line(error)}): check the bucket's name, "
                         "the network and that this machine's account may read the bucket and write objects (off Google's "
                         "machines: `gcloud auth application-default login`)") from error
    from etils import epath

    return epath.Path(url)


def _objects(directory: epath.Path) -> tuple[list[str], list[str]]:
    """Names of all objects under a place: those that make something whole, inner ones last; and the others."""
    import fsspec

    names = fsspec.filesystem("gcs").find(str(directory))
    marks = [name for name in names if name.endswith(f"/{COMMITTED}")]
    return sorted(marks, key=lambda name: name.count("/")), [name for name in names if name not in set(marks)]


def delete(directory: epath.Path) -> None:
    import fsspec

    marks, others = _objects(directory)
    for names in (*([mark] for mark in marks), others):
        if names:
            fsspec.filesystem("gcs").rm(names)


def move(directory: epath.Path, target: epath.Path) -> None:
    """Rename a directory, by copies inside of the bucket."""
    import fsspec

    marks, others = _objects(directory)
    start, new = str(directory).removeprefix("gs://"), str(target).removeprefix("gs://")
    for names in (others, *([mark] for mark in reversed(marks))):
        if names:
            fsspec.filesystem("gcs").copy(names, [new + name.removeprefix(start) for name in names])
    delete(directory)


def copy_files(source: Directory, target: Directory) -> None:
    """Copy the files of a directory, small ones, to or from a bucket."""
    if not is_remote(target):
        target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())

"""Download of the CORE evaluation bundle (162 MB), verified before it is moved to its directory."""

import stat
import zipfile
from pathlib import Path, PurePosixPath

from nanochat_jax.errors import NotFound, UsageError, explaining
from nanochat_jax.eval.core import read_tasks
from nanochat_jax.files import (
    entries,
    fetch_file,
    finish_directory,
    is_complete,
    locked,
    new_directory,
)
from nanochat_jax.paths import Paths

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MAX_UNPACKED_BYTES = 4 << 30


def has_bundle(paths: Paths) -> bool:
    return (paths.eval_bundle / "core.yaml").is_file() and is_complete(paths.eval_bundle)


def ensure_bundle(paths: Paths, *, url: str = BUNDLE_URL) -> Path:
    """The directory of a complete bundle, downloaded if missing.

    Raises `NotFound` if it cannot be downloaded or the files on disk are incomplete, and
    `UsageError` if the archive is not the bundle.
    """
    target = paths.eval_bundle
    with locked(target):
        finish_directory(target)
        if has_bundle(paths):
            _check_complete(target)
            return target
        if target.exists() and entries(target):
            raise NotFound(
                f"{target} has no core.yaml, so it is not the evaluation bundle: move it away to "
                "download the bundle"
            )
        try:
            with new_directory(target) as aside:
                archive = fetch_file(url, aside / ".eval_bundle.zip")
                _unpack(archive, aside)
                archive.unlink()
                _check_complete(aside)
        except NotFound as error:
            raise NotFound(
                f"{error}; that is, unzip a copy of the bundle so that {target / 'core.yaml'} "
                "exists, or evaluate without CORE"
            ) from error
    return target


def _check_complete(bundle: Path) -> None:
    """Raise `NotFound` unless every task has its examples and its baseline."""
    try:
        missing = [str(task.path) for task in read_tasks(bundle) if not task.path.is_file()]
    except (KeyError, FileNotFoundError) as error:
        missing = [str(error)]
    if missing:
        raise NotFound(
            f"the evaluation bundle in {bundle} is incomplete ({len(missing)} missing, first "
            f"{missing[0]}): remove the directory to download it again"
        )


def _unpack(archive: Path, directory: Path) -> None:
    """Extract the plain files below `eval_bundle/`."""
    what = "the downloaded evaluation bundle is damaged"
    with explaining(what, "try again", zipfile.BadZipFile), zipfile.ZipFile(archive) as bundle:
        members = [member for member in bundle.infolist() if _is_wanted(member)]
        size = sum(member.file_size for member in members)
        if size > MAX_UNPACKED_BYTES:
            raise UsageError(
                f"{archive.name} unpacks to {size} bytes: that is not the evaluation bundle"
            )
        for member in members:
            member.filename = member.filename.removeprefix("eval_bundle/")
            bundle.extract(member, directory)  # checks the CRC


def _is_wanted(member: zipfile.ZipInfo) -> bool:
    """Whether to extract a member. Raises `UsageError` if it is unsafe."""
    path = PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
        raise UsageError(
            f"the evaluation bundle has a member {member.filename!r} outside its directory: it is "
            "not unpacked"
        )
    file_type = stat.S_IFMT(member.external_attr >> 16)
    if file_type not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UsageError(
            f"the evaluation bundle has a member {member.filename!r} that is not a plain file: it "
            "is not unpacked"
        )
    return path.parts[0] == "eval_bundle" and not member.is_dir()  # macOS adds another directory

"""The CORE evaluation bundle: fetched once (162 MB), checked, unpacked beside its final place and moved there whole."""

import logging
import os
import shutil
import stat
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath

from nanochat_jax.cli import NotFound, UsageError
from nanochat_jax.eval.core import read_tasks
from nanochat_jax.paths import Paths

logger = logging.getLogger(__name__)

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 3
MAX_UNPACKED_BYTES = 4 << 30
CHUNK = 1 << 20


def has_bundle(paths: Paths) -> bool:
    return (paths.eval_bundle / "core.yaml").is_file()


def ensure_bundle(paths: Paths, *, url: str = BUNDLE_URL) -> Path:
    """The directory of a complete bundle: what is on disk, else a fresh download.

    Raises `NotFound` if it cannot be fetched, or if the files on disk are incomplete; `UsageError` if the archive is
    not the bundle.
    """
    target = paths.eval_bundle
    if has_bundle(paths):
        _check_complete(target)
        return target
    if target.exists() and any(target.iterdir()):
        raise NotFound(f"{target} has no core.yaml: it is not the evaluation bundle, move it away to fetch that")
    paths.base.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".eval_bundle-", dir=paths.base))
    try:
        _download(url, aside / "bundle.zip", target)
        _unpack(aside / "bundle.zip", aside)
        _check_complete(aside / "eval_bundle")
        _move(aside / "eval_bundle", target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _check_complete(bundle: Path) -> None:
    """Every task has its rows and its baseline."""
    try:
        missing = [str(task.path) for task in read_tasks(bundle) if not task.path.is_file()]
    except (KeyError, FileNotFoundError) as error:
        missing = [str(error)]
    if missing:
        raise NotFound(f"the evaluation bundle in {bundle} is incomplete ({len(missing)} missing, first {missing[0]}): "
                       "remove the directory to download it again")


def _download(url: str, path: Path, target: Path) -> None:
    logger.info("fetching the evaluation bundle from %s", url)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response, path.open("wb") as file:
                shutil.copyfileobj(response, file, CHUNK)
                expected = response.headers.get("Content-Length")
            if expected is not None and path.stat().st_size != int(expected):
                raise OSError(f"the connection ended after {path.stat().st_size} of {expected} bytes")
            return
        except (OSError, urllib.error.URLError) as error:
            logger.warning("attempt %d of %d failed: %s", attempt, ATTEMPTS, error)
            failure = error
    raise NotFound(f"could not fetch {url} ({failure}): unzip a copy of it so that {target / 'core.yaml'} exists, "
                   "or evaluate without CORE")


def _unpack(archive: Path, directory: Path) -> None:
    """Extract the `eval_bundle/` tree, plain files only."""
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = [member for member in bundle.infolist() if _is_wanted(member)]
            size = sum(member.file_size for member in members)
            if size > MAX_UNPACKED_BYTES:
                raise UsageError(f"{archive.name} unpacks to {size} bytes: that is not the evaluation bundle")
            for member in members:
                bundle.extract(member, directory)  # checks the CRC of what it reads
    except zipfile.BadZipFile as error:
        raise UsageError(f"the downloaded evaluation bundle is damaged ({error}): try again") from error


def _is_wanted(member: zipfile.ZipInfo) -> bool:
    """Whether to extract a member; raises `UsageError` for one that would leave the directory or is no plain file."""
    path = PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
        raise UsageError(f"the evaluation bundle has a member {member.filename!r} outside its directory: not unpacked")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UsageError(f"the evaluation bundle has a member {member.filename!r} that is no plain file: not unpacked")
    return path.parts[0] == "eval_bundle" and not member.is_dir()  # macOS adds a tree of its own


def _move(source: Path, target: Path) -> None:
    """Put the finished tree in its place; another process may have been first."""
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    try:
        os.rename(source, target)
    except OSError:
        if not (target / "core.yaml").is_file():
            raise

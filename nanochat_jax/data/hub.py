"""Downloads of files of Hugging Face data sets.

huggingface_hub handles the protocol (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, redirects). But its
`hf_hub_download` deletes a partial file when the download fails, so the next run starts over
(huggingface_hub#4196). Here, partial files stay in `.download/` beside the target, under a name
with the content's checksum, and later attempts and runs resume them. The target is created by one
rename, after its size and checksum are verified.
"""

import errno
import hashlib
import io
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers, disable_progress_bars

from nanochat_jax.errors import UsageError
from nanochat_jax.files import fsync

logger = logging.getLogger(__name__)

ATTEMPTS = 5
PARTIAL_DIR = ".download"

# Errors that a retry cannot fix: the server or the disk refuses.
_REFUSED = (
    EntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    OfflineModeIsEnabled,
)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
_SHA256 = re.compile("[0-9a-f]{64}")

# Called with (bytes so far, total bytes or None).
Progress = Callable[[int, int | None], None]


def fetch(
    repo: str,
    name: str,
    target: Path,
    *,
    revision: str = "main",
    check: Callable[[Path], None] = lambda path: None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Download the file `name` of a data set to `target`, replacing it.

    Makes five attempts, with pauses of 2, 4, 8 and 16 seconds, and raises the last error. `check`
    receives the file's temporary path and raises `UsageError` if the content is wrong.
    """
    quiet_client()
    partial_dir = target.parent / PARTIAL_DIR
    partial_dir.mkdir(parents=True, exist_ok=True)
    before = _identity(target)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with WeakFileLock(partial_dir / f"{target.name}.lock"):
                if before != (now := _identity(target)) and now is not None:
                    return  # another process has downloaded it
                path = _download(repo, name, revision, partial_dir, target.name, progress)
                try:
                    check(path)
                except UsageError:
                    path.unlink()
                    raise
                fsync(path)
                os.replace(path, target)
            fsync(target.parent)
            return
        except Exception as error:  # the HTTP client's errors have no common class
            if attempt == ATTEMPTS or not _may_pass(error):
                raise
            logger.warning(
                "%s: attempt %d of %d failed (%s)", name, attempt, ATTEMPTS, first_line(error)
            )
            time.sleep(2**attempt)


def quiet_client() -> None:
    """Turn off progress bars and the HTTP client's log line per request."""
    disable_progress_bars()
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def clean_up(directory: Path) -> None:
    """Remove `fetch`'s temporary directory in `directory`, unless it holds a partial download."""
    folder = directory / PARTIAL_DIR
    if not any(folder.glob("*.part")):
        shutil.rmtree(folder, ignore_errors=True)


def _download(
    repo: str, name: str, revision: str, folder: Path, label: str, progress: Progress
) -> Path:
    """The path of the complete file, under a temporary name in `folder`."""
    if constants.HF_HUB_OFFLINE:
        cached = hf_hub_download(
            repo, name, repo_type="dataset", revision=revision, local_files_only=True
        )
        return Path(shutil.copyfile(cached, folder / f"{label}.part"))
    url = hf_hub_url(repo, name, repo_type="dataset", revision=revision)
    facts = get_hf_file_metadata(url)
    path = folder / f"{label}.{(facts.etag or 'unknown')[:16]}.part"
    for other in folder.glob(f"{label}.*.part"):
        if other != path:  # from another version of the file
            other.unlink()
    have = path.stat().st_size if path.exists() and facts.etag else 0
    if facts.size is not None and have > facts.size:
        have = 0
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    with _Counted(path, "ab" if have else "wb", lambda done: progress(done, facts.size)) as file:
        try:
            http_get(url, file, resume_size=have, headers=headers, expected_size=facts.size)
        except OSError as error:
            wrong_size = "Consistency check" in str(error)
            if wrong_size and facts.size is not None and file.tell() > facts.size:
                file.truncate(0)  # the received bytes do not belong to this file
            raise
    if facts.etag and _SHA256.fullmatch(facts.etag):
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != facts.etag:
            path.unlink()
            raise OSError(
                f"{name} has the checksum {digest[:16]}..., the Hub announced {facts.etag[:16]}..."
            )
    return path


class _Counted(io.FileIO):
    """A file that reports its length after every write.

    It is unbuffered, so that the next run can resume from every byte received.
    """

    def __init__(self, path: Path, mode: str, report: Callable[[int], None]):
        super().__init__(path, mode)
        self._report = report

    def write(self, data: Any) -> int:
        left = memoryview(data)
        while left:  # an unbuffered write may be partial
            left = left[super().write(left) :]
        self._report(self.tell())
        return len(data)


def _identity(path: Path) -> tuple[int, int] | None:
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def _may_pass(error: Exception) -> bool:
    """Whether a retry may succeed."""
    if isinstance(error, LocalEntryNotFoundError):  # also raised when the connection fails
        return not constants.HF_HUB_OFFLINE
    if isinstance(error, (*_REFUSED, UsageError)):
        return False
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return status >= 500 or status in (408, 429)
    return not (isinstance(error, OSError) and error.errno in _DISK_ERRORS)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

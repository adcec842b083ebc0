"""Errors that a user can cause, and how they are worded: one line with what failed, the value and
what to do.

A message names a setting in backquotes, as Python code does (`device_batch_size`, `remat=block`).
Command lines print it as the flag (`--device-batch-size`, `--remat block`): see `cli.with_flags`.
"""

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

# What reading data of another form raises.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError)


class UsageError(Exception):
    """A user error: what failed, the value, and what to do, in one line."""


class NotFound(UsageError, FileNotFoundError):
    """A required file, checkpoint or tokenizer is missing."""


def one_line(error: BaseException) -> str:
    """The text of an error on one line, for a `UsageError`."""
    text = re.sub(r" \[(source locations|tensorstore_spec)=.*", "", " ".join(str(error).split()))
    if len(text) > 500:
        text = f"{text[:200]} ... {text[-295:]}"
    return text or type(error).__name__


def write_failure(error: BaseException) -> str:
    """The cause of a failed write, on one line."""
    text = one_line(error)
    chain, full = error, False
    while chain is not None and not full:
        code = chain.errno if isinstance(chain, OSError) else None
        full = code in (errno.ENOSPC, errno.EDQUOT) or bool(
            re.search("ENOSPC|EDQUOT|[Nn]o space left|quota exceeded", str(chain))
        )
        chain = chain.__cause__ or chain.__context__  # type: ignore[assignment]
    return f"the disk is full, no space is left: {text}" if full else text


@contextlib.contextmanager
def explaining(what: str, advice: str = "", *types: type[Exception]) -> Iterator[None]:
    """Turn errors of `types` (`MALFORMED` if none) into `UsageError`: `what` (error): `advice`."""
    caught = types or MALFORMED
    try:
        yield
    except UsageError:
        raise
    except caught as error:
        text = repr(error) if isinstance(error, KeyError) else one_line(error)
        raise UsageError(f"{what} ({text})" + (advice and f": {advice}")) from error


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Add the file's name to errors of reading and writing it inside this block."""
    try:
        yield
    except OSError as error:
        if error.errno not in (None, errno.EPIPE) and error.filename is None:
            error.filename = str(path)
        raise

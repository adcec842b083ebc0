"""One writer per tag, and no steps overwritten unasked."""

import contextlib
import time
import uuid
from collections.abc import Iterator

import jax

from nanochat_jax.errors import UsageError
from nanochat_jax.files import LOCK, lock_file
from nanochat_jax.model.sharding import barrier, gather_json
from nanochat_jax.paths import delete_steps, refuse_foreign, saved_steps
from nanochat_jax.storage import Directory, ObjectLock, is_remote

IN_USE = "wait for it or stop it, or name another `model_tag`"

_bucket_locks: dict[str, ObjectLock] = {}  # of this process, by directory


@contextlib.contextmanager
def lock_tag(directory: Directory) -> Iterator[None]:
    """Lock a tag's directory against other writers while the block runs. Reading needs no lock.

    Process 0 holds the lock for all processes of the run. Raises `UsageError` in all of them if
    another run holds it.
    """
    failure = ""
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                if is_remote(directory):
                    lock = stack.enter_context(ObjectLock(directory, IN_USE))
                    _bucket_locks[str(directory)] = lock
                    stack.callback(_bucket_locks.pop, str(directory))
                else:
                    stack.enter_context(lock_file(directory / LOCK, str(directory), IN_USE))
            except UsageError as error:
                failure = str(error)
        if failure := gather_json(failure)[0]:
            raise UsageError(failure)
        yield


def lost(directory: Directory) -> bool:
    """Whether another run has taken this process's lock of a tag over."""
    lock = _bucket_locks.get(str(directory))
    return lock is not None and lock.lost


def claim_directory(directory: Directory, *, resume: bool | None, fresh: bool) -> None:
    """Check a tag's directory before a run writes to it: existing steps need `resume` or `fresh`.

    `fresh` deletes them. `resume` is None if the run cannot resume. Raises `UsageError` also if the
    directory holds another program's checkpoints, or if processes see different directories.
    """
    refuse_foreign(directory)
    if jax.process_count() > 1 and not is_remote(directory):
        _check_shared(directory)
    if fresh:
        if jax.process_index() == 0:
            delete_steps(directory)
        barrier("old steps deleted")
    elif not resume and (steps := saved_steps(directory)):
        raise UsageError(
            f"{directory} already holds steps {', '.join(map(str, steps))}: "
            f"{'' if resume is None else '`resume` continues from them, '}`fresh` deletes them, "
            "another `model_tag` keeps them"
        )


def _check_shared(directory: Directory) -> None:
    """Raise `UsageError` if a process does not see the directory of process 0."""
    probe = directory / f".seen-by-all-{gather_json(uuid.uuid4().hex)[0]}"
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
    barrier("touched")
    deadline = time.monotonic() + 5  # network file systems may show it late
    while not probe.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = gather_json(probe.exists())
    if jax.process_index() == 0:
        probe.unlink()
    if not all(seen):
        raise UsageError(
            f"process {seen.index(False)} does not see process 0's {directory}: put the base "
            "directory on a disk that all hosts share, or the checkpoints in a bucket "
            "(NANOCHAT_CHECKPOINT_DIR=gs://...)"
        )

"""Checkpoints with Orbax: parameters, optimizer, data position and metadata in one atomic step.

    <source>_checkpoints/<tag>/<step>/{params,optimizer,state}    metrics.jsonl is next to the steps
                                                                  imported weights: no `optimizer`

Each step has checksums of its content. If a step is damaged, a warning is logged and the previous
one is loaded; a resumed run renames it to `damaged-<step>`. Only `keep` and `--fresh` delete steps.
"""

import contextlib
import gc
import itertools
import json
import logging
import math
import sys
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array
from jax.sharding import Mesh

from nanochat_jax.errors import NotFound, UsageError, one_line, write_failure
from nanochat_jax.files import LOCK, lock_file
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.sharding import (
    abstract_tree,
    barrier,
    gather_json,
    make_mesh,
    param_shardings,
)
from nanochat_jax.model.weights import Params, abstract_params
from nanochat_jax.paths import (
    Paths,
    base_tokenizer,
    delete_steps,
    foreign_checkpoints,
    how_to_get,
    refuse_foreign,
    rename_directory,
    saved_steps,
)
from nanochat_jax.storage import Directory, ObjectLock, copy_files, is_remote
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)
# Orbax warns about every read-only directory.
logging.getLogger("absl").addFilter(lambda record: "is read only" not in record.getMessage())

CHECKSUMS = "checksums"  # key of the checksums in the JSON state
IN_USE = "wait for it or stop it, or name another --model-tag"


class Damaged(Exception):
    """A step cannot be read, or its content differs from what was saved."""


def _read(directory: Directory, step: int, **items: Any) -> dict[str, Any]:
    """Items of a step (names of Orbax's arguments).

    Raises `Damaged` in all processes if one of them cannot read it.
    """
    # Each process reads its share in a group of its own. Otherwise the others would wait for a
    # process that fails.
    own = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
    options = ocp.CheckpointManagerOptions(
        read_only=True, save_interval_steps=0, create=False, multiprocessing_options=own
    )
    found, said = {}, ""
    try:
        with ocp.CheckpointManager(directory, options=options) as manager:
            found = dict(manager.restore(step, args=ocp.args.Composite(**items)).items())
    except Exception as error:  # Orbax raises many types for damaged data
        if "RESOURCE_EXHAUSTED" in str(error):  # memory ran out: the step is not damaged
            raise
        said = one_line(error).partition(" See full TensorStore details")[0]
    if said:
        _drop_readers()
    for index, failure in enumerate(gather_json(said)):
        if failure:
            raise Damaged(f"process {index}: {failure}" if jax.process_count() > 1 else failure)
    return found


def _drop_readers() -> None:
    """Collect Orbax's failed readers silently.

    They hold unretrieved errors, which Python would print at the next garbage collection.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


@jax.jit
def _array_checksum(array: Array) -> Array:
    array = jnp.asarray(array)
    words = jax.lax.bitcast_convert_type(
        array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    ).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        stride = math.prod(array.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride)
    return (words * (2 * place + 1)).sum(dtype=jnp.uint32)


def _checksum(tree: Any) -> int:
    """A 32-bit checksum of the tree's arrays, independent of their sharding.

    Words times odd numbers that depend on the position, added modulo 2^32: the order of additions
    does not matter, and every changed word changes the sum. One array at a time, because on a CPU
    each needs its size in temporaries.
    """
    return (
        sum(
            int(_array_checksum(leaf)) * (2 * number + 1)
            for number, leaf in enumerate(jax.tree.leaves(tree))
        )
        % 2**32
    )


def _state_checksum(state: dict[str, Any]) -> int:
    return zlib.crc32(
        json.dumps({k: v for k, v in state.items() if k != CHECKSUMS}, sort_keys=True).encode()
    )


def _structure(tree: Any) -> int:
    """CRC-32 of the names, shapes and dtypes of a tree."""
    described = [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return zlib.crc32(json.dumps(described).encode())


def _read_trees(
    directory: Directory, step: int, state: dict[str, Any], **abstract: Any
) -> dict[str, Any]:
    """Trees of a step whose JSON state is `state`.

    Raises `Damaged` if a checksum differs; steps without checksums are not verified.
    """
    found = _read(
        directory, step, **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    )
    for name, expected in state.get(CHECKSUMS, {}).get("content", {}).items():
        if name in found and _checksum(found[name]) != expected:
            raise Damaged(f"the checksum of its {name} does not match")
    return found


def _newest(directory: Directory, steps: list[int], read: Callable[[int], Any]) -> Any:
    """`read(step)` for the greatest of `steps` that is not damaged.

    Raises `UsageError` if all are damaged.
    """
    for step in reversed(steps):
        try:
            return read(step)
        except Damaged as error:
            log.warning("checkpoint %s cannot be read (%s)", directory / str(step), error)
    raise UsageError(
        f"none of the steps {steps} in {directory} can be read; there are "
        f"{', '.join(map(str, saved_steps(directory)))}: choose another, or delete them"
    )


@dataclass(frozen=True)
class Restored:
    """One step. `state` is its JSON (step, model_config, config, position, loop, ...)."""

    step: int
    params: Params
    optimizer: Any
    state: dict[str, Any]


class Checkpoints:
    """The steps of one run, saved asynchronously.

    Use as a context manager, so that no step is left incomplete.
    """

    def __init__(self, directory: Directory, *, keep: int | None = None) -> None:
        self.directory = directory
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            create=True,
        )
        self._manager = ocp.CheckpointManager(directory, options=options)
        self._saving: int | None = None  # the step whose save is not known to be finished

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            self._manager.close()
        except Exception as error:
            if kind is None:
                raise
            # another exception is being raised already
            log.warning("closing %s: %s", self.directory, one_line(error))

    def save(self, step: int, params: Params, optimizer: Any, state: dict[str, Any]) -> None:
        """Start to write a step. Raises `UsageError` if an earlier save failed."""
        self.wait()
        if (lock := _bucket_locks.get(str(self.directory))) and lock.lost:
            raise UsageError(
                f"another run has taken {self.directory} over, as this one did not renew its lock: "
                "nothing more is saved"
            )
        trees = {"params": params} | ({} if optimizer is None else {"optimizer": optimizer})
        sums = {
            "content": {name: _checksum(tree) for name, tree in trees.items()},
            "structure": {name: _structure(tree) for name, tree in trees.items()},
            "state": _state_checksum(state),
        }
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["state"] = ocp.args.JsonSave(state | {CHECKSUMS: sums})
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # the synchronous part of a save
            raise self._failed(step, error) from error

    def check(self) -> None:
        """Raise `UsageError` if a save has failed in the background. Does not wait."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until the current save, if any, is on disk. Raises `UsageError` if it failed."""
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:  # any error of the disk or the network
            raise self._failed(step, error) from error

    def _failed(self, step: int, error: Exception) -> UsageError:
        self._saving = None
        self._manager.reload()
        return UsageError(
            f"the checkpoint of step {step} could not be written ({write_failure(error)}): fix "
            "that, then "
            "continue with --resume"
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def last_step(self) -> int | str:
        return max(self.steps(), default="none")

    def set_aside(self, steps: list[int], prefix: str) -> None:
        """Rename steps to `<prefix>-<step>`, so that they can be saved again; deletes nothing."""
        if jax.process_index() == 0:
            for step in steps:
                names = (f"{prefix}-{step}" + (f"-{n}" if n else "") for n in itertools.count())
                free = next(name for name in names if not (self.directory / name).exists())
                rename_directory(self.directory / str(step), self.directory / free)
        barrier("steps set aside")
        self._manager.reload()

    def restore(
        self,
        step: int,
        abstract: Params,
        abstract_optimizer: Any = None,
        accept: Callable[[dict[str, Any]], None] = lambda state: None,
    ) -> Restored:
        """One complete step; the optimizer only if `abstract_optimizer` is given.

        `accept` may raise on its state before the arrays are read. Raises `UsageError` if it is
        another kind of checkpoint, and `Damaged`.
        """
        state = read_meta(self.directory, step)
        sums = state.pop(CHECKSUMS, {})
        accept(state)
        if abstract_optimizer is not None and "optimizer" not in sums.get(
            "structure", {"optimizer": 0}
        ):
            raise UsageError(
                f"{self.directory / str(step)} holds no optimizer state, as imported weights do "
                "not: train "
                "under another --model-tag"
            )
        trees = {"params": abstract} | (
            {} if abstract_optimizer is None else {"optimizer": abstract_optimizer}
        )
        for name, structure in sums.get("structure", {}).items():
            if name in trees and structure != _structure(trees[name]):
                raise UsageError(
                    f"{self.directory / str(step)} holds other {name} than this run's: its "
                    "architecture or "
                    "kind of optimizer was another"
                )
        found = _read_trees(self.directory, step, {CHECKSUMS: sums}, **trees)
        return Restored(step, found["params"], found.get("optimizer"), state)

    def restore_latest(
        self,
        abstract: Any,
        abstract_optimizer: Any,
        *,
        step: int | None = None,
        accept: Callable[[dict[str, Any]], None] = lambda state: None,
    ) -> Restored | None:
        """The newest readable step, None if there are no steps; or the existing step `step`.

        Newer steps are renamed, never deleted.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise UsageError(
                f"no step {step} in {self.directory}: there are "
                f"{', '.join(map(str, steps)) or 'none'}"
            )
        if not steps:
            return None
        restored = _newest(
            self.directory,
            steps if step is None else [step],
            lambda each: self.restore(each, abstract, abstract_optimizer, accept),
        )
        later = [other for other in steps if other > restored.step]
        self.set_aside(later, "damaged" if step is None else "replaced")
        return restored


@dataclass(frozen=True)
class Loaded:
    """A trained model, ready for inference or for the next stage."""

    config: GPTConfig
    params: Params
    own_tokenizer: Tokenizer | None  # None if imported without one
    meta: dict[str, Any]
    directory: Directory
    step: int
    source: str

    @property
    def tag(self) -> str:
        return self.directory.name

    @property
    def tokenizer(self) -> Tokenizer:
        if self.own_tokenizer is None:
            raise UsageError(
                f"{self.directory} was imported without a tokenizer: import it again with "
                "--tokenizer DIR"
            )
        return self.own_tokenizer


_bucket_locks: dict[str, ObjectLock] = {}  # of this process, by directory


@contextlib.contextmanager
def lock_tag(directory: Directory) -> Iterator[None]:
    """Lock a tag's directory against other writers while the block runs. Reading needs no lock.

    Process 0 holds the lock for all processes of the run. Raises `UsageError` in all of them if
    another run holds it.
    """
    said = ""
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                if is_remote(directory):
                    _bucket_locks[str(directory)] = stack.enter_context(
                        ObjectLock(directory, IN_USE)
                    )
                    stack.callback(_bucket_locks.pop, str(directory))
                else:
                    stack.enter_context(lock_file(directory / LOCK, str(directory), IN_USE))
            except UsageError as error:
                said = str(error)
        if said := gather_json(said)[0]:
            raise UsageError(said)
        yield


def claim_directory(directory: Directory, *, resume: bool | None, fresh: bool) -> None:
    """Check a tag's directory before a run writes to it: existing steps need `resume` or `fresh`.

    `fresh` deletes them. `resume` is None if the run cannot resume. Raises `UsageError` also if the
    directory holds another program's checkpoints, or if processes see different directories.
    """
    refuse_foreign(directory)
    if jax.process_count() > 1 and not is_remote(directory):
        ours = directory / f".seen-by-all-{gather_json(uuid.uuid4().hex)[0]}"
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            ours.touch()
        barrier("touched")
        deadline = time.monotonic() + 5  # network file systems may show it late
        while not ours.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        seen = gather_json(ours.exists())
        if jax.process_index() == 0:
            ours.unlink()
        if not all(seen):
            raise UsageError(
                f"{directory} is another one on process {seen.index(False)} than on process 0: "
                "put the base directory on a disk that all hosts share, or the checkpoints in a "
                "bucket "
                "(NANOCHAT_CHECKPOINT_DIR=gs://...)"
            )
    if fresh:
        if jax.process_index() == 0:
            delete_steps(directory)
        barrier("old steps deleted")
    elif not resume and (steps := saved_steps(directory)):
        raise UsageError(
            f"{directory} already holds steps {', '.join(map(str, steps))}: "
            f"{'' if resume is None else '--resume goes on with them, '}--fresh deletes them, "
            "--model-tag names "
            "another place"
        )


def read_meta(directory: Directory, step: int) -> dict[str, Any]:
    """The JSON state of a step, with its checksums. Raises `Damaged`."""
    state = _read(directory, step, state=ocp.args.JsonRestore())["state"]
    if CHECKSUMS in state and state[CHECKSUMS]["state"] != _state_checksum(state):
        raise Damaged("the checksum of its state does not match")
    return state


def load_model(
    paths: Paths,
    source: str,
    *,
    tag: str | None = None,
    step: int | None = None,
    mesh: Mesh | None = None,
    fsdp: bool = False,
) -> Loaded:
    """The parameters of a stage ("base", "mid", "sft" or "rl"), from `find_model`'s directory."""
    return load_directory(
        find_model(paths, source, tag), source=source, step=step, mesh=mesh, fsdp=fsdp
    )


def find_model(paths: Paths, source: str, tag: str | None) -> Directory:
    """The directory of a stage's tag. Without a tag: the largest `d<depth>`, else the newest.

    Raises `NotFound` if it has no step.
    """
    directory = paths.checkpoints(source) / (tag or paths.find_tag(source))
    if not saved_steps(directory):
        if (others := paths.tags(source)) and not foreign_checkpoints(directory):
            raise NotFound(f"no {source} checkpoint in {directory}: there are {', '.join(others)}")
        raise NotFound(
            f"no {source} checkpoint in {directory}: "
            f"{how_to_get(source, directory if foreign_checkpoints(directory) else None)}"
        )
    return directory


def load_directory(
    directory: Directory,
    *,
    source: str = "base",
    step: int | None = None,
    mesh: Mesh | None = None,
    fsdp: bool = False,
) -> Loaded:
    """The model in a tag's directory, float32, sharded; without a step, the greatest readable one.

    Its tokenizer is in `tokenizer/` under it (an imported model's own) or in the base directory.
    Raises `NotFound` if the step is missing, `UsageError` if the tokenizer is not the checkpoint's.
    """
    steps = saved_steps(directory)
    if not steps or step is not None and step not in steps:
        raise NotFound(
            f"no step {'' if step is None else step} in {directory}: there are "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    mesh = make_mesh("1x1") if mesh is None else mesh

    def load(candidate: int) -> Loaded:
        log.info("loading %s step %d", directory, candidate)
        meta = read_meta(directory, candidate)
        config = GPTConfig.from_dict(meta["model_config"])
        tokenizer = _load_tokenizer(directory, meta["tokenizer"])
        abstract = abstract_tree(abstract_params(config), param_shardings(config, mesh, fsdp=fsdp))
        params = _read_trees(directory, candidate, meta, params=abstract)["params"]
        return Loaded(config, params, tokenizer, meta, directory, candidate, source)

    return _newest(directory, steps if step is None else [step], load)


def _load_tokenizer(directory: Directory, fingerprint: str | None) -> Tokenizer | None:
    """The tokenizer that a checkpoint was trained with; None if it was imported without one."""
    if fingerprint is None:
        return None
    place = directory / "tokenizer"
    if is_remote(directory):
        place = _remote_tokenizer(directory, fingerprint)
        with tempfile.TemporaryDirectory() as scratch:
            if place.is_dir():
                copy_files(place, Path(scratch))
            try:
                tokenizer = Tokenizer.load(Path(scratch))
            except NotFound as error:
                raise NotFound(
                    f"the tokenizer of {directory} is missing in {place}: copy it there"
                ) from error
    else:
        own, shared = place, base_tokenizer(directory)
        # The tag's own may belong to deleted steps.
        for place in [each for each in (own, shared) if each.is_dir()] or [shared]:
            tokenizer = Tokenizer.load(place)
            if tokenizer.fingerprint() == fingerprint:
                break
    if tokenizer.fingerprint() != fingerprint:
        raise UsageError(
            f"the tokenizer in {place} is not the one {directory} was trained with: "
            "restore that tokenizer, or train the model again"
        )
    return tokenizer


def _remote_tokenizer(directory: Directory, fingerprint: str) -> Directory:
    """A bucket's tokenizer directory, by fingerprint.

    Under the tag, Orbax would delete it as an incomplete step.
    """
    return directory.parent.parent / "tokenizers" / fingerprint


def keep_tokenizer(
    tokenizer: Tokenizer, directory: Directory, origin: Loaded | None = None
) -> None:
    """Save the tokenizer for those who load the run's steps.

    Needed in a bucket, and if the model that the run continues has its own.
    """
    if jax.process_index() != 0:
        return
    if is_remote(directory):
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save(Path(scratch))
            copy_files(Path(scratch), _remote_tokenizer(directory, tokenizer.fingerprint()))
    elif origin is not None and (origin.directory / "tokenizer").is_dir():
        tokenizer.save(directory / "tokenizer")


def load_optimizer(loaded: Loaded, abstract: Any) -> Any:
    """The optimizer state saved with a loaded model; `abstract`: its shapes and shardings."""
    directory = loaded.directory
    if not (directory / str(loaded.step) / "optimizer").is_dir():
        raise NotFound(
            f"{directory / str(loaded.step)} was saved without an optimizer: use --load-optimizer 0"
        )
    try:
        return _read_trees(directory, loaded.step, loaded.meta, optimizer=abstract)["optimizer"]
    except Damaged as error:
        raise UsageError(
            f"the optimizer state in {directory / str(loaded.step)} cannot be read ({error}): use "
            "--load-optimizer 0"
        ) from error

"""Checkpoints with Orbax: parameters, optimizer state, data position and metadata in one atomic
step directory.

    <source>_checkpoints/<tag>/<step>/{params,optimizer,state}      metrics.jsonl beside the steps;
                                                                    `optimizer` is absent where
                                                                    weights were imported

Each step carries checksums of its content. One that is torn or damaged is passed over, with a
warning that names it, for the one before; a resumed run renames it to `damaged-<step>`. Nothing
here deletes a step but `keep` and `--fresh`.
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

from nanochat_jax.cli import NotFound, UsageError, one_line, write_failure
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
# Orbax warns of every directory that it is told to read only, in a notebook too.
logging.getLogger("absl").addFilter(lambda record: "is read only" not in record.getMessage())

CHECKSUMS = "checksums"  # its key in the state
IN_USE = "wait for it or stop it, or name another --model-tag"


class Damaged(Exception):
    """A step cannot be read, or its content is not what was saved."""


def _read(directory: Directory, step: int, **items: Any) -> dict[str, Any]:
    """Items of a step (names of Orbax's arguments). Raises `Damaged` in all processes if it cannot
    be read in one.
    """
    # Each process reads its share alone, in a group of its own: else one that fails would leave
    # the others waiting.
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
    except Exception as error:  # Orbax raises many kinds for torn data
        if "RESOURCE_EXHAUSTED" in str(error):  # memory ran out: nothing is wrong with the step
            raise
        said = one_line(error).partition(" See full TensorStore details")[0]
    if said:
        _drop_readers()
    for index, failure in enumerate(gather_json(said)):
        if failure:
            raise Damaged(f"process {index}: {failure}" if jax.process_count() > 1 else failure)
    return found


def _drop_readers() -> None:
    """Orbax's other readers of a damaged step hold errors that nobody waits for: Python would
    print pages about each, the next time that it collects garbage.
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
    """A number of 32 bits that depends on every bit of the tree's arrays and on its place, and not
    on how they are sharded: words times odd numbers, added modulo 2^32, so that no order of
    additions matters and no changed word goes unseen. One array after the other, for on a CPU each
    takes as much memory again.
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
    """Of the names, shapes and dtypes of a tree."""
    described = [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return zlib.crc32(json.dumps(described).encode())


def _read_trees(
    directory: Directory, step: int, state: dict[str, Any], **abstract: Any
) -> dict[str, Any]:
    """Trees of a step whose JSON state is `state`. Raises `Damaged` if one is not as it was saved;
    steps without checksums are taken as they are.
    """
    found = _read(
        directory, step, **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    )
    for name, expected in state.get(CHECKSUMS, {}).get("content", {}).items():
        if name in found and _checksum(found[name]) != expected:
            raise Damaged(f"the checksum of its {name} does not match")
    return found


def _newest(directory: Directory, steps: list[int], read: Callable[[int], Any]) -> Any:
    """What `read` makes of the greatest of `steps` that is not damaged. Raises `UsageError` if all
    are.
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
    """One step: `state` is the JSON written with it (step, model_config, config, position, loop,
    ...).
    """

    step: int
    params: Params
    optimizer: Any
    state: dict[str, Any]


class Checkpoints:
    """The steps of one run. Saves are asynchronous; use as a context manager, so that none is left
    half-written.
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
        self._saving: int | None = None  # the step whose save has not been seen to end

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            self._manager.close()
        except Exception as error:
            if kind is None:
                raise
            # beside the error that is on its way already
            log.warning("closing %s: %s", self.directory, one_line(error))

    def save(self, step: int, params: Params, optimizer: Any, state: dict[str, Any]) -> None:
        """Start writing a step; raises here if an earlier save failed in the background."""
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
        except Exception as error:  # the part of a save that is not in the background
            raise self._failed(step, error) from error

    def check(self) -> None:
        """Raises `UsageError` if a save has failed in the background. Costs nothing while none is
        on its way.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until the save on its way, if any, is on disk; raises `UsageError` if it failed."""
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:  # whatever the disk or the network says
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
        """Rename steps, out of the way of the saves that will come to them again; nothing is
        deleted.
        """
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
        """One step, whole; the optimizer only if asked for. `accept` may refuse its state before
        the arrays are read.

        Raises `UsageError` if it is another kind of checkpoint, and `Damaged`.
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
        """The newest step that can be read whole, or None if there is no step at all; or `step`,
        which must be there.

        Newer steps, damaged or not wanted, are renamed, never deleted.
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
    own_tokenizer: Tokenizer | None  # None if it was imported without one
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
    """Keep other runs from writing to a tag while the block runs. Reading it needs no lock.

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
    """Before a run writes to a tag: steps that are there are continued or deleted only if the user
    said which.

    `resume` is None where nothing can go on. Raises `UsageError`, too, if the directory holds
    another program's checkpoints, or the processes of the run do not see the same one.
    """
    refuse_foreign(directory)
    if jax.process_count() > 1 and not is_remote(directory):
        ours = directory / f".seen-by-all-{gather_json(uuid.uuid4().hex)[0]}"
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            ours.touch()
        barrier("touched")
        deadline = time.monotonic() + 5  # a network's file system may show it late
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
    """Load the parameters of a stage ("base", "mid", "sft" or "rl") as `load_directory` does, from
    `find_model`.
    """
    return load_directory(
        find_model(paths, source, tag), source=source, step=step, mesh=mesh, fsdp=fsdp
    )


def find_model(paths: Paths, source: str, tag: str | None) -> Directory:
    """The directory of a stage's tag, which has a step. Without a tag: the largest `d<depth>`,
    else the newest.

    Raises `NotFound` when there is none.
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
    """Load the parameters of a tag's directory, float32, placed on the mesh; without a step, the
    greatest that can be read.

    Its tokenizer is in `tokenizer/` under it (where an imported model brought one that is not the
    base directory's), else in that of the base directory. Raises `NotFound` when there is no such
    step and `UsageError` when the checkpoint was trained with another tokenizer.
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
    """The tokenizer that a checkpoint was trained with; its fingerprint is None if it was imported
    without one.
    """
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
        # The tag's own may belong to steps that were deleted since.
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
    """In a bucket tokenizers lie by fingerprint; under the tag Orbax would take one for half of a
    step and delete it.
    """
    return directory.parent.parent / "tokenizers" / fingerprint


def keep_tokenizer(
    tokenizer: Tokenizer, directory: Directory, origin: Loaded | None = None
) -> None:
    """Put the tokenizer where those who load a run's steps look for it: with a bucket, and if the
    model that the run goes on from has one of its own.
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
    """The optimizer state that was saved with a loaded model; `abstract` says its shapes and where
    it shall lie.
    """
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

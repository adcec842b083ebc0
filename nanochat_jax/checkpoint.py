"""Checkpoints with Orbax: parameters, optimizer state, data position and metadata in one atomic step directory.

    <source>_checkpoints/<tag>/<step>/{params,optimizer,state}      metrics.jsonl beside the steps; `optimizer` is
                                                                    absent where weights were imported

A step that is torn or damaged is set aside as `damaged-<step>`, with a warning that names it, for the one before.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from nanochat_jax.cli import NotFound, UsageError
from nanochat_jax.config import GPTConfig
from nanochat_jax.gpt import Params, abstract_params
from nanochat_jax.paths import HOW_TO_MAKE, Paths
from nanochat_jax.sharding import make_mesh, param_shardings
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Besides read_only, what Orbax would otherwise set itself, with a warning each time.
READ_ONLY = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)


@dataclass(frozen=True)
class Restored:
    """One step: `state` is the JSON written with it (step, model_config, config, position, loop, ...)."""

    step: int
    params: Params
    optimizer: Any
    state: dict[str, Any]


class Checkpoints:
    """The steps of one run. Saves are asynchronous; use as a context manager, so that none is left half-written."""

    def __init__(self, directory: Path, *, keep: int | None = None) -> None:
        self.directory = directory
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True, create=True
        )
        self._manager = ocp.CheckpointManager(directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def save(self, step: int, params: Params, optimizer: Any, state: dict[str, Any]) -> None:
        """Start writing a step; raises here if an earlier save failed in the background."""
        items: dict[str, Any] = {"params": ocp.args.StandardSave(params), "state": ocp.args.JsonSave(state)}
        if optimizer is not None:
            items["optimizer"] = ocp.args.StandardSave(optimizer)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def _set_aside(self, step: int) -> None:
        """Out of the way of the save that will come to this step again; nothing is deleted."""
        damaged = self.directory / f"damaged-{step}"
        if jax.process_index() == 0:
            shutil.rmtree(damaged, ignore_errors=True)  # of an earlier time
            (self.directory / str(step)).rename(damaged)
        multihost_utils.sync_global_devices("damaged checkpoint set aside")
        self._manager.reload()

    def restore_latest(self, abstract: Any, abstract_optimizer: Any) -> Restored | None:
        """The newest step that can be read whole, or None if there is no step at all."""
        steps = self.steps()
        for step in reversed(steps):
            items = {"params": ocp.args.StandardRestore(abstract), "state": ocp.args.JsonRestore(),
                     "optimizer": ocp.args.StandardRestore(abstract_optimizer)}
            try:
                found = self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # Orbax raises many kinds for torn data; the step is passed over, loudly
                log.warning("checkpoint %s cannot be read (%.200s): setting it aside and trying the step before",
                            self.directory / str(step), error)
                self._set_aside(step)
                continue
            return Restored(step, found.params, found.optimizer, found.state)
        if steps:
            raise UsageError(f"none of the steps {steps} in {self.directory} can be read: delete them or use --fresh")
        return None


@dataclass(frozen=True)
class Loaded:
    """A trained model, ready for inference or for the next stage."""

    config: GPTConfig
    params: Params
    tokenizer: Tokenizer | None  # None only where the caller said that it needs none
    meta: dict[str, Any]
    directory: Path
    step: int
    source: str

    @property
    def tag(self) -> str:
        return self.directory.name


def saved_steps(directory: Path) -> list[int]:
    """Steps with a complete directory under a tag, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit() and (path / "params").is_dir())


def claim_directory(directory: Path, *, resume: bool, fresh: bool) -> None:
    """Before a run writes to a tag: steps that are there are continued or deleted only if the user said which."""
    if fresh and jax.process_index() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    elif not resume and (steps := saved_steps(directory)):
        raise UsageError(f"{directory} already holds steps {', '.join(map(str, steps))}: --resume goes on with them, "
                         "--fresh deletes them, --model-tag names another place")


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """The JSON state of a step."""
    with ocp.CheckpointManager(directory, options=READ_ONLY) as manager:
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.JsonRestore())).state


def load_model(paths: Paths, source: str, *, tag: str | None = None, step: int | None = None, mesh: Mesh | None = None,
               fsdp: bool = False, need_tokenizer: bool = True) -> Loaded:
    """Load the parameters of a stage ("base", "mid", "sft" or "rl"), as `load_directory` does.

    Without a tag: the largest `d<depth>`, else the newest. Raises `NotFound` when there is none.
    """
    directory = paths.checkpoints(source) / (tag or paths.find_tag(source))
    if not saved_steps(directory):
        raise NotFound(f"no {source} checkpoint in {directory}: run `python -m {HOW_TO_MAKE[source]}` first")
    return load_directory(directory, source=source, step=step, mesh=mesh, fsdp=fsdp, need_tokenizer=need_tokenizer)


def load_directory(directory: Path, *, source: str = "base", step: int | None = None, mesh: Mesh | None = None,
                   fsdp: bool = False, need_tokenizer: bool = True) -> Loaded:
    """Load the parameters of a tag's directory, float32, placed on the mesh; without a step, the greatest.

    Its tokenizer is in `tokenizer/` under it (where an imported model brought one that is not the base directory's), else
    in that of the base directory. Raises `NotFound` when there is no such step and `UsageError` when the checkpoint was
    trained with another tokenizer, or came without one and `need_tokenizer`.
    """
    steps = saved_steps(directory)
    step = steps[-1] if step is None and steps else step
    if step not in steps:
        raise NotFound(f"no step {step} in {directory}: there are {', '.join(map(str, steps)) or 'none'}")
    log.info("loading %s step %d", directory, step)
    meta = read_meta(directory, step)
    config = GPTConfig.from_dict(meta["model_config"])
    tokenizer = _load_tokenizer(directory, meta["tokenizer"], need_tokenizer)
    mesh = make_mesh("1x1") if mesh is None else mesh
    abstract = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                            abstract_params(config), param_shardings(config, mesh, fsdp=fsdp))
    try:
        with ocp.CheckpointManager(directory, options=READ_ONLY) as manager:
            found = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract)))
    except Exception as error:  # Orbax raises many kinds for torn data
        earlier = ", ".join(map(str, steps[: steps.index(step)])) or "none"
        raise UsageError(f"checkpoint {directory / str(step)} cannot be read ({str(error)[:200]}); "
                         f"earlier steps: {earlier}") from error
    return Loaded(config, found.params, tokenizer, meta, directory, step, source)


def _load_tokenizer(directory: Path, fingerprint: str | None, needed: bool) -> Tokenizer | None:
    """The tokenizer that a checkpoint was trained with; its fingerprint is None if it was imported without one."""
    if fingerprint is None:
        if needed:
            raise UsageError(f"{directory} was imported without a tokenizer: import it again with --tokenizer DIR")
        return None
    own, shared = directory / "tokenizer", directory.resolve().parent.parent / "tokenizer"
    place = own if own.is_dir() else shared
    tokenizer = Tokenizer.load(place)
    if tokenizer.fingerprint() != fingerprint:
        raise UsageError(f"the tokenizer in {place} is not the one {directory} was trained with: "
                         "restore that tokenizer, or train the model again")
    return tokenizer


def carry_tokenizer(loaded: Loaded, directory: Path) -> None:
    """Give the next stage's directory the tokenizer that a model carries with it, if it does not use the shared one."""
    if (loaded.directory / "tokenizer").is_dir() and jax.process_index() == 0:
        loaded.tokenizer.save(directory / "tokenizer")

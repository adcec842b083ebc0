"""Saving and restoring the steps of one run."""

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp

from nanochat_jax.checkpoint import locking
from nanochat_jax.checkpoint.integrity import (
    CHECKSUMS,
    add_checksums,
    newest_readable,
    read_state,
    read_trees,
    structure,
)
from nanochat_jax.errors import UsageError, one_line, write_failure
from nanochat_jax.model.sharding import barrier
from nanochat_jax.model.weights import Params
from nanochat_jax.paths import rename_directory
from nanochat_jax.storage import Directory

log = logging.getLogger(__name__)

Accept = Callable[[dict[str, Any]], None]  # raises if a step's JSON state does not fit the run


@dataclass(frozen=True)
class Restored:
    """One step. `state` is its JSON (step, model_config, config, position, loop, ...)."""

    step: int
    params: Params
    optimizer: Any
    state: dict[str, Any]


class Checkpoints:
    """The steps of one run, saved asynchronously."""

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

    def __exit__(self, exception_type: type | None, *_: Any) -> None:
        try:
            self._manager.close()
        except Exception as error:
            if exception_type is None:
                raise
            # another exception is being raised already
            log.warning("closing %s: %s", self.directory, one_line(error))

    def save(self, step: int, params: Params, optimizer: Any, state: dict[str, Any]) -> None:
        """Start to write a step. Raises `UsageError` if an earlier save failed."""
        self.wait()
        if locking.lost(self.directory):
            raise UsageError(
                f"another run has taken {self.directory} over, because this one did not renew its "
                "lock: nothing more is saved"
            )
        trees = {"params": params} | ({} if optimizer is None else {"optimizer": optimizer})
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["state"] = ocp.args.JsonSave(add_checksums(state, trees))
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
            "that, then continue with `resume`"
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
        accept: Accept = lambda state: None,
    ) -> Restored:
        """One complete step; the optimizer only if `abstract_optimizer` is given.

        `accept` is called before the arrays are read. Raises `UsageError` if the checkpoint is of
        another architecture or optimizer, and `Damaged`.
        """
        path = self.directory / str(step)
        state = read_state(self.directory, step)
        checksums = state.pop(CHECKSUMS, {})
        accept(state)
        trees = {"params": abstract}
        if abstract_optimizer is not None:
            trees["optimizer"] = abstract_optimizer
            if "optimizer" not in checksums.get("structure", {"optimizer": 0}):
                raise UsageError(
                    f"{path} has no optimizer state, because its weights were imported: train "
                    "under another `model_tag`"
                )
        for name, expected in checksums.get("structure", {}).items():
            if name in trees and expected != structure(trees[name]):
                raise UsageError(
                    f"the {name} in {path} do not fit this run: its architecture or type of "
                    "optimizer differs"
                )
        content = read_trees(self.directory, step, checksums, **trees)
        return Restored(step, content["params"], content.get("optimizer"), state)

    def restore_latest(
        self,
        abstract: Any,
        abstract_optimizer: Any,
        *,
        step: int | None = None,
        accept: Accept = lambda state: None,
    ) -> Restored | None:
        """The newest readable step, None if there are no steps; or the existing step `step`.

        Newer steps are renamed, never deleted.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            saved = ", ".join(map(str, steps)) or "none"
            raise UsageError(f"no step {step} in {self.directory}; saved steps: {saved}")
        if not steps:
            return None
        restored = newest_readable(
            self.directory,
            steps if step is None else [step],
            lambda candidate: self.restore(candidate, abstract, abstract_optimizer, accept),
        )
        later = [other for other in steps if other > restored.step]
        self.set_aside(later, "damaged" if step is None else "replaced")
        return restored

"""Resuming: which checkpoint a run continues from, and why it may refuse one."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax

from nanochat_jax.checkpoint import Checkpoints, Restored
from nanochat_jax.errors import UsageError
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.sharding import abstract_tree
from nanochat_jax.paths import saved_steps
from nanochat_jax.storage import Directory
from nanochat_jax.train.config import RunConfig
from nanochat_jax.train.job import Job, Source
from nanochat_jax.train.step import TrainState, saved_form

# Settings that a saved state depends on. The resolved values of `RESOLVED` are saved as well.
RESOLVED = ("data", "packing", "total_batch_size")
DECISIVE = (
    *("depth", "arch", "aspect_ratio", "head_dim", "max_seq_len", "window_pattern"),
    *("data", "packing", "data_shards", "total_batch_size"),
    *("mixture", "mmlu_epochs", "gsm8k_epochs", "source", "grad_clip", "weight_decay"),
)


def restore(
    job: Job, checkpoints: Checkpoints, state: TrainState, shardings: TrainState, source: Source
) -> Restored | None:
    """The step to continue from, or None. Sets `source` to its position.

    Frees the memory of `state` for the restored arrays. Raises `UsageError`, with the settings that
    differ, if the step belongs to another run.
    """

    def accept(saved: dict[str, Any]) -> None:
        require_same_run(job, saved)
        source.set_state(saved["position"])

    abstract = saved_form(abstract_tree(state, shardings))
    if checkpoints.steps():
        for leaf in jax.tree.leaves(state):
            leaf.delete()
    step = job.config.resume_from_step
    with explaining_differences(job.config, job.directory, job.metadata):
        return checkpoints.restore_latest(
            *abstract, step=step if step >= 0 else None, accept=accept
        )


def require_same_run(job: Job, saved: dict[str, Any]) -> None:
    """Raise `UsageError` if this job cannot continue from the metadata of a checkpoint."""
    directory, advice = job.directory, "use `fresh` or another `model_tag`"
    try:  # compared as configs: a field added since has its default
        same = GPTConfig.from_dict(saved["model_config"]) == job.model
    except ValueError:  # a field of a later version
        same = False
    if not same:
        raise UsageError(f"{directory} holds a model of another shape: {advice}")
    if saved.get("tokenizer") != job.metadata.get("tokenizer"):
        raise UsageError(
            f"{directory} was trained with another tokenizer: restore that one, or {advice}"
        )
    if saved["step"] > job.num_steps:
        raise UsageError(
            f"{directory} is at step {saved['step']}, past the {job.num_steps} of this run: set "
            f"`num_iterations={saved['step']}` or more, or {advice}"
        )


@contextlib.contextmanager
def explaining_differences(
    config: RunConfig, directory: Directory, metadata: dict[str, Any]
) -> Iterator[None]:
    """Add the settings that differ from the saved run's to a `UsageError` when resuming."""
    try:
        yield
    except UsageError as error:
        steps = saved_steps(directory) if config.resuming else []
        asked = config.resume_from_step
        step = asked if asked in steps else max(steps, default=-1)
        difference = ""
        with contextlib.suppress(OSError, ValueError):  # an unreadable step explains nothing
            if step >= 0:  # without Orbax, which waits for all processes
                state = directory / str(step) / "state" / "metadata"
                difference = differences(config, metadata, json.loads(state.read_text()))
        if not difference:
            raise
        raise UsageError(f"{error}{difference}") from error


def differences(config: RunConfig, metadata: dict[str, Any], saved: dict[str, Any]) -> str:
    """The settings that differ from the saved run's, for an error; "" if none."""
    mine = dataclasses.asdict(config)
    before, now = (
        settings | {name: values[name] for name in RESOLVED if name in values}
        for settings, values in ((saved.get("config", {}), saved), (mine, metadata))
    )

    def text(name: str, value: Any) -> str:
        return f"no `{name}`" if value is None else f"`{name}={value}`"

    changed = [
        f"{text(name, before[name])} (now {text(name, now[name])})"
        for name in DECISIVE
        if name in mine and name in before and before[name] != now[name]
    ]
    return f". The saved run had {', '.join(changed)}" if changed else ""

"""What a stage hands to the training loop (`Job`, its data `Source`), and what it gets back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np

from nanochat_jax.checkpoint import Loaded
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.loss import Batch
from nanochat_jax.model.weights import Params
from nanochat_jax.storage import Directory
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.config import RunConfig
from nanochat_jax.train.step import BatchShape, shard_batch


class StepBatch(NamedTuple):
    """One step's batch, as a source returns it."""

    batch: Batch  # global arrays [A, B, T]
    host: dict[str, np.ndarray]  # this process's part, saved if the loss is not finite
    figures: dict[str, float]  # logged


class Source(Protocol):
    """Source of each step's batch: a data loader, or rollouts of the current parameters."""

    # the batch depends on the step's parameters; if a signal interrupts it, it is made again
    on_policy: ClassVar[bool]

    def next_batch(self, step: int, params: Params) -> StepBatch: ...

    @property
    def position(self) -> dict[str, Any]:
        """Position of the last batch, a few numbers for the log. Cheap, unlike `get_state`."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class LoaderSource:
    """Batches of a data loader; they do not depend on the parameters."""

    # endless iterator of {"inputs", "targets"} with a position: this process's rows [R, T]
    loader: Any
    shape: BatchShape
    mesh: jax.sharding.Mesh
    on_policy: ClassVar[bool] = False

    def next_batch(self, step: int, params: Params) -> StepBatch:
        host = next(self.loader)
        rows = Batch(host["inputs"], host["targets"])
        return StepBatch(shard_batch(rows, self.shape, self.mesh), host, {})

    @property
    def position(self) -> dict[str, Any]:
        return self.loader.position

    def get_state(self) -> dict[str, Any]:
        return self.loader.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self.loader.set_state(state)


def is_due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


@dataclass(frozen=True)
class Evaluation:
    """Metrics computed from the parameters at some steps, written to metrics.jsonl."""

    every: int  # in steps; below 1: only at the end
    run: Callable[[Params], dict[str, float]]
    at_end: bool = True
    at_start: bool = False

    def due(self, step: int, last: bool) -> bool:
        return (last and self.at_end) or (step == 0 and self.at_start) or is_due(step, self.every)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage's training, besides the state and the data."""

    name: str
    config: RunConfig
    model: GPTConfig
    directory: Directory
    logs: Path  # for metrics, traces and dumps; like `directory`, unless that is in a bucket
    num_steps: int
    # of each batch; None: it differs per step, so the step is not compiled in advance
    shape: BatchShape | None
    lr_multiplier: Callable[[Any], Any]
    evaluations: Sequence[Evaluation]
    metadata: dict[str, Any]  # saved in every checkpoint: tokenizer fingerprint, corpus, ...
    primary: str = "val_bpb"  # metric whose minimum is recorded
    dry_run: bool = False
    tokenizer: Tokenizer | None = None  # saved with the checkpoints if they would lack one
    origin: Loaded | None = None
    shown: Sequence[str] = ()  # metrics on the progress display


@dataclass(frozen=True)
class Outcome:
    """Results of a finished run."""

    params: Params
    last: dict[str, float]  # metrics of the last evaluation
    minimum: float  # of the primary metric
    train_loss: float  # smoothed
    seconds: float  # in training steps, excluding compilation, evaluation and saving
    tokens_per_sec: float
    mfu: float | None  # fraction of the devices' peak; None if that is unknown
    peak_memory: int

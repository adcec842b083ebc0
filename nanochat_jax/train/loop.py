"""The training loop of all stages, RL included: train, log, evaluate, save, resume, stop.

Each step does, in this order: save, evaluate, stop if it is the last, train. So no failed
evaluation loses a checkpoint. A step's metrics are read after the next one is dispatched, so the
device never waits for logging.
"""

import collections
import contextlib
import dataclasses
import gc
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.checkpoint import Checkpoints, Loaded, Restored, claim_directory, keep_tokenizer
from nanochat_jax.cli import LARGEST, LARGEST_SEED, directory_name, flag, run_name, spelled
from nanochat_jax.data.loader import merge_states
from nanochat_jax.devices import Processes
from nanochat_jax.errors import UsageError, naming
from nanochat_jax.metrics import (
    Display,
    MetricsLog,
    Profiler,
    peak_flops,
    peak_memory_bytes,
    start_wandb,
)
from nanochat_jax.model.compute import ATTENTION, REMAT
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.loss import Batch
from nanochat_jax.model.sharding import abstract_tree, barrier, data_share, gather_json
from nanochat_jax.model.size import flops_per_token
from nanochat_jax.model.weights import Params
from nanochat_jax.paths import saved_steps
from nanochat_jax.storage import Directory
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.memory import compile_step, is_out_of_memory, out_of_memory
from nanochat_jax.train.step import BatchShape, TrainState, shard_batch
from nanochat_jax.train.stopping import EXIT_STOPPED, Interrupted, StopRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Processes):
    """Flags of every training stage."""

    run: str = flag("dummy", "wandb run name; dummy turns wandb off", check=run_name)
    mesh: str = flag("auto", "devices as DxM: D-way data and M-way tensor parallelism")
    fsdp: bool | None = flag(
        None, "shard the parameters over the data axis too; default: where memory asks for it"
    )
    dtype: str = flag("auto", "compute dtype", choices=["auto", "float32", "bfloat16"])
    remat: str = flag(
        "auto",
        "activations that the backward pass recomputes, to save memory: none; minimal: all but "
        "matmuls "
        "and attention; block: all inside of layers; full: most layers' inputs too (no effect on "
        "a CPU, "
        "whose compiler undoes it); auto: chosen by memory",
        choices=["auto", *REMAT, "elementwise"],
    )
    attention: str = flag(
        "auto",
        "attention kernel; auto: splash on TPUs, cudnn on NVIDIA GPUs, else xla",
        choices=ATTENTION,
    )
    device_batch_size: int | Literal["auto"] | None = flag(
        None,
        "rows per device and micro-step; auto: the most that fit into memory, by compiling; "
        "default 32, or 16 or 8 where "
        "more should not fit",
        at_least=1,
        at_most=10**6,
    )
    num_iterations: int = flag(
        -1, "optimizer steps; -1: the recipe's horizon", at_least=1, at_most=10**9, also=-1
    )
    eval_every: int = flag(
        250, "steps between evaluations; -1: only at the end", at_least=1, at_most=10**9, also=-1
    )
    save_every: int = flag(
        -1,
        "steps between checkpoints; -1: before every evaluation; 0: only at the end",
        at_least=0,
        at_most=10**9,
        also=-1,
    )
    keep: int = flag(2, "how many of the newest checkpoints to keep", at_least=1, at_most=10**9)
    resume: bool = flag(False, "continue from the newest checkpoint of this tag, if there is one")
    resume_from_step: int = flag(
        -1,
        "continue from this step of the tag; later ones are renamed. -1: see --resume",
        at_least=0,
        at_most=10**9,
        also=-1,
    )
    fresh: bool = flag(False, "delete the checkpoints that this tag already has, and start over")
    model_tag: str | None = flag(
        None, "name of the checkpoint directory; default d<depth>", check=directory_name
    )
    seed: int = flag(42, "seed of the initial weights", at_least=0, at_most=LARGEST_SEED)
    profile: str | None = flag(
        None,
        "START:STOP, steps to trace for xprof; the trace goes to profile/ beside the checkpoints",
    )
    compile_cache: bool = flag(
        True, "keep compiled programs under the base directory for the next start"
    )

    def __post_init__(self) -> None:
        if self.remat == "elementwise":  # the mode's former name
            object.__setattr__(self, "remat", "minimal")
        if self.resuming and self.fresh:
            raise ValueError(
                "--resume goes on with the checkpoints of a tag, --fresh deletes them: give one "
                "of them"
            )
        self.profiled_steps  # noqa: B018  (raises if it is malformed)

    @property
    def resuming(self) -> bool:
        return self.resume or self.resume_from_step >= 0

    @property
    def profiled_steps(self) -> range:
        if self.profile is None:
            return range(0)
        start, colon, stop = self.profile.partition(":")
        if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
            raise ValueError(
                f"--profile {self.profile!r} is not START:STOP, two steps such as 10:13"
            )
        return range(int(start), int(stop))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Flags of the stages that train on text."""

    total_batch_size: int = flag(
        -1, "tokens per optimizer step; -1: the recipe's", at_least=1, at_most=2**40, also=-1
    )
    eval_tokens: int = flag(20 * 524288, "tokens of an evaluation", at_least=1, at_most=LARGEST)


class StepBatch(NamedTuple):
    """One step's batch, as a source returns it."""

    batch: Batch  # global arrays [A, B, T]
    host: dict[str, np.ndarray]  # this process's part, saved if the loss is not finite
    figures: dict[str, float]  # logged


class Source(Protocol):
    """Source of each step's batch: a data loader, or rollouts of the current parameters."""

    # made from the step's parameters; after a signal interrupts it, it is made again
    on_policy: ClassVar[bool]

    def next_batch(self, step: int, params: Params) -> StepBatch: ...

    @property
    def position(self) -> dict[str, Any]:
        """Position of the last batch in the data, a few numbers for the log.

        Cheap, unlike `get_state`.
        """

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

    name: str  # "base_train", "mid_train", "chat_sft", "chat_rl"
    config: RunConfig
    model: GPTConfig
    directory: Directory  # of the tag's checkpoints
    # for metrics, traces, dumps; like `directory`, unless that is in a bucket
    logs: Path
    num_steps: int
    # None: it differs per step, so the step is not compiled in advance
    shape: BatchShape | None
    lr_multiplier: Callable[[Any], Any]
    evaluations: Sequence[Evaluation]
    metadata: dict[str, Any]  # saved in every checkpoint: tokenizer fingerprint, corpus, ...
    primary: str = "val_bpb"  # metric whose minimum is recorded
    dry_run: bool = False  # saves nothing
    # saved with the checkpoints if they would lack one
    tokenizer: Tokenizer | None = None
    origin: Loaded | None = None  # the model this one continues
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


def is_due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def global_position(state: dict[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The run's data position, from those of all processes at the same step."""
    shares = dict(gather_json([data_share(mesh)[0], state]))
    states = [shares[index] for index in sorted(shares)]
    return merge_states(states) if "shards" in state else states[0]


class _Reporter:
    """Logs and displays the metrics of finished steps; rejects non-finite values."""

    def __init__(
        self,
        job: Job,
        loop: dict[str, Any],
        start: int,
        mesh: jax.sharding.Mesh,
        resumed: bool,
        wandb_run: Any,
    ) -> None:
        self._job, self._loop = job, loop
        self._wandb = wandb_run
        self.log = MetricsLog(
            job.logs / "metrics.jsonl",
            resume_step=start if resumed else None,
            steps=job.directory,
            wandb_run=self._wandb,
        )
        self.display = Display(job.name, job.num_steps, start=start)
        peak = peak_flops(jax.devices()[0])
        self.peak = peak * mesh.size if peak else None
        self._rates = np.asarray(jax.jit(jax.vmap(job.lr_multiplier))(jnp.arange(job.num_steps)))
        # Seconds of the last ten steps. Steps overlap, so the average is meaningful, not one lap.
        self._laps: collections.deque[float] = collections.deque(maxlen=10)

    def restart_clock(self) -> None:
        """Exclude the time until now (saving, evaluating) from the next step's."""
        self._mark = time.perf_counter()

    def finish(
        self, step: int, metrics: dict[str, Any], batch: StepBatch, position: dict[str, Any]
    ) -> None:
        """Wait for a dispatched step and log it.

        Raises `UsageError` if its loss or gradient is not finite.
        """
        job, loop = self._job, self._loop
        figures: dict[str, Any] = batch.figures | {
            name: float(value) for name, value in metrics.items()
        }
        now = time.perf_counter()
        self._laps.append(now - self._mark)
        self._mark = now
        if not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])):
            said = (
                f"the loss of step {step} is {figures['loss']}, "
                f"the gradient's norm {figures['grad_norm']}"
            )
            dump = job.logs / f"bad-batch-{step}-{jax.process_index()}.npz"
            dump.parent.mkdir(parents=True, exist_ok=True)
            with naming(dump):
                np.savez(dump, **cast(dict[str, Any], batch.host))
            raise UsageError(f"{said}; the batch is in {dump}")
        loop["smooth_loss"] = 0.9 * loop["smooth_loss"] + 0.1 * figures["loss"]
        loop["seconds"] += self._laps[-1]
        loop["timed_steps"] += 1
        seconds = sum(self._laps) / len(self._laps)
        shown = {name: f"{figures[name]:.3f}" for name in job.shown}
        if job.shape:
            rate = job.shape.tokens / seconds
            mfu = flops_per_token(job.model) * rate / self.peak if self.peak else None
            figures |= {
                "supervised": int(figures["tokens"]),
                "tokens": (step + 1) * job.shape.tokens,
                "position": position,
                "tokens_per_sec": rate,
                "mfu": "n/a" if mfu is None else mfu,
            }
            shown |= {
                "loss": f"{loop['smooth_loss'] / (1.0 - 0.9 ** (step + 1)):.4f}",
                "tok/s": f"{rate:,.0f}",
                "mfu": "n/a" if mfu is None else f"{100 * mfu:.1f}%",
            }
        self.log.write(
            step=step,
            kind="train",
            time=time.time(),
            lrm=float(self._rates[step]),
            seconds=seconds,
            peak_memory=peak_memory_bytes(),
            **figures,
        )
        self.display.update(step + 1, **shown)

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        if self._job.primary in figures:
            self._loop["minimum"] = min(self._loop["minimum"], figures[self._job.primary])
        self.log.write(step=step, kind="eval", time=time.time(), **figures)
        told = [f"{name} {value:.4f}" for name, value in figures.items()]
        if len(told) > 6:  # such as RL's pass@k for each k; metrics.jsonl has all
            told[4:-1] = ["..."]
        self.display.note(f"{self._job.name} step {step}: " + ", ".join(told))

    def close(self) -> None:
        self.display.close()
        self.log.close()
        if self._wandb is not None:
            self._wandb.finish()


# Flags that a saved state depends on. Their resolved values are saved as well.
_FITTING = (
    "depth",
    "arch",
    "aspect_ratio",
    "head_dim",
    "max_seq_len",
    "window_pattern",
    "data",
    "packing",
    "data_shards",
    "total_batch_size",
    "mixture",
    "mmlu_epochs",
    "gsm8k_epochs",
    "source",
    "grad_clip",
    "weight_decay",
)


def _other_flags(config: RunConfig, metadata: dict[str, Any], saved: dict[str, Any]) -> str:
    """The flags that differ from the saved run's, for an error; "" if none."""
    resolved = ("data", "packing", "total_batch_size")
    mine = dataclasses.asdict(config)
    before, now = (
        flags | {name: values[name] for name in resolved if name in values}
        for flags, values in ((saved.get("config", {}), saved), (mine, metadata))
    )
    changed = [
        f"{spelled(name, before[name])} (now {spelled(name, now[name])})"
        for name in _FITTING
        if name in mine and name in before and before[name] != now[name]
    ]
    return f". The saved run had {', '.join(changed)}" if changed else ""


@contextlib.contextmanager
def naming_other_flags(
    config: RunConfig, directory: Directory, metadata: dict[str, Any]
) -> Iterator[None]:
    """Add the flags that differ from the saved run's to a `UsageError` when resuming.

    `metadata` is what this run saves.
    """
    try:
        yield
    except UsageError as error:
        steps = saved_steps(directory) if config.resuming else []
        step = (
            config.resume_from_step if config.resume_from_step in steps else max(steps, default=-1)
        )
        advice = ""
        with contextlib.suppress(OSError, ValueError):  # an unreadable step adds no advice
            if step >= 0:  # without Orbax, which waits for all processes
                state = directory / str(step) / "state" / "metadata"
                advice = _other_flags(config, metadata, json.loads(state.read_text()))
        if not advice:
            raise
        raise UsageError(f"{error}{advice}") from error


def _restore(
    job: Job, checkpoints: Checkpoints, state: TrainState, shardings: TrainState, source: Source
) -> Restored | None:
    """The step to continue from, or None. Sets `source` to its position.

    Frees the memory of `state` for the restored arrays. Raises `UsageError`, with the flags that
    differ, if the step belongs to another run.
    """
    directory, step = job.directory, job.config.resume_from_step

    def accept(saved: dict[str, Any]) -> None:
        advice = "use --fresh or another --model-tag"
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
                f"{directory} is at step {saved['step']}, past the {job.num_steps} of this run: "
                "give "
                f"--num-iterations {saved['step']} or more, or {advice}"
            )
        source.set_state(saved["position"])

    abstract = abstract_tree(state, shardings)
    if checkpoints.steps():
        for leaf in jax.tree.leaves(state):
            leaf.delete()
    with naming_other_flags(job.config, directory, job.metadata):
        return checkpoints.restore_latest(
            *abstract, step=step if step >= 0 else None, accept=accept
        )


@contextlib.contextmanager
def _explained(job: Job, mesh: jax.sharding.Mesh, checkpoints: Checkpoints) -> Iterator[None]:
    """Errors of the loop, with advice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            raise (
                out_of_memory(job.shape, mesh)
                if job.shape
                else UsageError(
                    "a step does not fit into memory: halve --device-batch-size or --num-slots, "
                    "or give --remat or --fsdp"
                )
            ) from error
        raise
    except UsageError as error:
        with contextlib.suppress(UsageError):
            checkpoints.wait()
        raise UsageError(
            f"{error} (the last good checkpoint is step {checkpoints.last_step()} in "
            f"{job.directory})"
        ) from error


class _Loop:
    """One run: its state, its current step, and the work of each step."""

    def __init__(
        self,
        job: Job,
        state: TrainState,
        step_fn: Callable,
        source: Source,
        checkpoints: Checkpoints,
        stop: StopRequest,
    ) -> None:
        self.job, self.state, self.checkpoints = job, state, checkpoints
        self._step_fn, self._source, self._stop = step_fn, source, stop
        self.totals = {"minimum": math.inf, "smooth_loss": 0.0, "seconds": 0.0, "timed_steps": 0}
        self.start = 0
        self.figures: dict[str, float] = {}  # of the last evaluation
        self._saved_at: int | None = None
        # arguments of `_Reporter.finish` for the step dispatched last
        self._pending: tuple | None = None

    def restore(self, shardings: TrainState) -> bool:
        """Continue from a checkpoint; False if there is none."""
        restored = _restore(self.job, self.checkpoints, self.state, shardings, self._source)
        if restored is None:
            return False
        self.start = self._saved_at = restored.step
        self.totals |= restored.state.get("loop", {})
        self.state = TrainState(restored.params, restored.optimizer)
        log.info("resuming %s at step %d", self.job.directory, self.start)
        return True

    def run(self, reporter: _Reporter, profiler: Profiler) -> None:
        self._reporter, self._profiler, job = reporter, profiler, self.job
        step = self.start
        try:
            for step in range(self.start, job.num_steps + 1):
                last = step == job.num_steps
                self.checkpoints.check()
                if self._stop.reached(step) and not last:
                    raise Interrupted
                due = [evaluation for evaluation in job.evaluations if evaluation.due(step, last)]
                save_every = job.config.save_every
                if last or is_due(step, save_every) or (due and save_every == -1):
                    self._save(step)
                if due:
                    self._evaluate(step, due)
                if not last:
                    self._advance(step)
            self.checkpoints.wait()
        except Interrupted:
            self._save(step)
            self.checkpoints.wait()
            reporter.display.close()
            what_now = (
                "a dry run saves nothing"
                if job.dry_run
                else "saved; run the same command with --resume to continue"
            )
            log.warning("stopped by signal %d at step %d: %s", self._stop.signal, step, what_now)
            raise SystemExit(EXIT_STOPPED) from None

    def _flush(self) -> None:
        """Wait for the step in flight and log it."""
        if self._pending:
            self._reporter.finish(*self._pending)
            self._pending = None

    def _save(self, step: int) -> None:
        job = self.job
        if job.dry_run:
            return
        self._flush()
        if step == self._saved_at:
            return
        position = self._source.get_state()
        own = {
            "step": step,
            "model_config": dataclasses.asdict(job.model),
            "loop": self.totals,
            "config": dataclasses.asdict(job.config),
            "position": global_position(position, _mesh_of(self.state)) if position else {},
        }
        assert not own.keys() & job.metadata.keys()
        self._reporter.log.copy()
        self.checkpoints.save(
            step,
            self.state.params,
            self.state.optimizer,
            json.loads(json.dumps(own | job.metadata)),
        )
        self._saved_at = step

    def _evaluate(self, step: int, due: Sequence[Evaluation]) -> None:
        self._flush()
        with self._stop.interruptible():
            self.figures = {
                name: value
                for evaluation in due
                for name, value in evaluation.run(self.state.params).items()
            }
        self._reporter.evaluated(step, self.figures)

    def _advance(self, step: int) -> None:
        """Dispatch a step, then log the previous one: the device never waits for logging."""
        if self._profiler.changes_at(step):
            self._flush()
        self._profiler.at(step)
        if self._pending is None:
            self._reporter.restart_clock()
        with self._stop.interruptible() if self._source.on_policy else contextlib.nullcontext():
            batch = self._source.next_batch(step, self.state.params)
        with self._profiler.annotate(step):
            self.state, metrics = self._step_fn(self.state, batch.batch)
        self._flush()
        self._pending = (step, metrics, batch, self._source.position)
        if self._source.on_policy:  # the next batch waits for this step anyway
            self._flush()

    def outcome(self, peak: float | None) -> Outcome:
        job, totals = self.job, self.totals
        rate = (
            job.shape.tokens * totals["timed_steps"] / totals["seconds"]
            if job.shape and totals["seconds"]
            else 0.0
        )
        return Outcome(
            params=self.state.params,
            last=self.figures,
            minimum=totals["minimum"],
            train_loss=totals["smooth_loss"] / (1.0 - 0.9**job.num_steps),
            seconds=totals["seconds"],
            tokens_per_sec=rate,
            mfu=flops_per_token(job.model) * rate / peak if peak else None,
            peak_memory=peak_memory_bytes(),
        )


def _mesh_of(state: TrainState) -> jax.sharding.Mesh:
    return state.params["wte"].sharding.mesh


@contextlib.contextmanager
def _directories(job: Job) -> Iterator[Job]:
    """The job with writable directories: the tag's, or temporary ones for a dry run."""
    if not job.dry_run:
        claim_directory(job.directory, resume=job.config.resuming, fresh=job.config.fresh)
        yield job
        return
    with tempfile.TemporaryDirectory(prefix="dry-run-") as scratch:
        yield dataclasses.replace(job, directory=Path(scratch), logs=Path(scratch), tokenizer=None)


def train(
    job: Job, state: TrainState, shardings: TrainState, step_fn: Any, source: Source
) -> Outcome:
    """Run the loop to `num_steps`, resuming if configured.

    `step_fn` is the jitted step of step.py. Exits with code 75 after a signal and a save. Raises
    `UsageError` if the loss is not finite, a step does not fit into memory, or a checkpoint cannot
    be written.
    """
    config, mesh = job.config, shardings.params["wte"].mesh
    if job.shape is not None:
        # What can fail for lack of memory or a package runs before --fresh deletes anything.
        step_fn, _ = compile_step(step_fn, state, job.shape, mesh)
    wandb_run = start_wandb(
        config.run, f"nanochat-{job.name.removeprefix('chat_')}", dataclasses.asdict(config)
    )
    with (
        _directories(job) as job,
        Checkpoints(job.directory, keep=config.keep) as checkpoints,
        StopRequest() as stop,
    ):
        if job.tokenizer is not None:
            keep_tokenizer(job.tokenizer, job.directory, job.origin)
        loop = _Loop(job, state, step_fn, source, checkpoints, stop)
        del state
        resumed = config.resuming and loop.restore(shardings)
        reporter = _Reporter(job, loop.totals, loop.start, mesh, resumed, wandb_run)
        profiler = Profiler(config.profiled_steps, job.logs / "profile")
        with _explained(job, mesh, checkpoints):
            try:
                gc.collect()
                # skip existing objects in later collections
                gc.freeze()
                loop.run(reporter, profiler)
            finally:
                gc.unfreeze()
                profiler.close()
                reporter.close()
        barrier("trained")
    return loop.outcome(reporter.peak)

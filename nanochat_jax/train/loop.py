"""The training loop of all stages, RL included: train, log, evaluate, save, resume, stop.

Each step does, in this order: stop if a signal asked for it, save, evaluate, train unless it is the
last. So no failed evaluation loses a checkpoint. A step's metrics are read after the next one is
dispatched, so the device never waits for logging.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from nanochat_jax.checkpoint import Checkpoints, claim_directory, keep_tokenizer
from nanochat_jax.data.loader import merge_states
from nanochat_jax.errors import UsageError
from nanochat_jax.metrics import Profiler, start_tracker
from nanochat_jax.model.sharding import barrier, data_share, gather_json
from nanochat_jax.train.job import Evaluation, Job, Outcome, Source, is_due
from nanochat_jax.train.memory import compile_step, is_out_of_memory, out_of_memory
from nanochat_jax.train.reporting import Reporter, Totals
from nanochat_jax.train.resume import restore
from nanochat_jax.train.step import TrainState, saved_form, stored_form
from nanochat_jax.train.stopping import EXIT_STOPPED, Interrupted, StopRequest

log = logging.getLogger(__name__)


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
        # What can fail for lack of memory or a package runs before `fresh` deletes anything.
        step_fn, _ = compile_step(step_fn, state, job.shape, mesh)
    project = f"nanochat-{job.name.removeprefix('chat_')}"
    tracker_run = start_tracker(
        config.tracker, config.run, project, job.directory.name, dataclasses.asdict(config)
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
        reporter = Reporter(job, loop.totals, loop.start if resumed else None, mesh, tracker_run)
        profiler = Profiler(config.profiled_steps, job.logs / "profile")
        with _explained(job, mesh, checkpoints):
            try:
                gc.collect()
                gc.freeze()  # later collections skip existing objects
                loop.run(reporter, profiler)
            finally:
                gc.unfreeze()
                profiler.close()
                reporter.close()
        barrier("trained")
    return reporter.outcome(loop.state.params, loop.figures)


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
        self.totals = Totals()
        self.start = 0
        self.figures: dict[str, float] = {}  # of the last evaluation
        self._saved_at: int | None = None
        # arguments of `Reporter.finish` for the step dispatched last
        self._pending: tuple | None = None

    def restore(self, shardings: TrainState) -> bool:
        """Continue from a checkpoint; False if there is none."""
        restored = restore(self.job, self.checkpoints, self.state, shardings, self._source)
        if restored is None:
            return False
        self.start = self._saved_at = restored.step
        self.totals = Totals(**restored.state.get("loop", {}))
        self.state = stored_form(TrainState(restored.params, restored.optimizer), self.state)
        log.info("resuming %s at step %d", self.job.directory, self.start)
        return True

    def run(self, reporter: Reporter, profiler: Profiler) -> None:
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
            advice = (
                "a dry run saves nothing"
                if job.dry_run
                else "saved; run the same command with `resume` to continue"
            )
            log.warning("stopped by signal %d at step %d: %s", self._stop.signal, step, advice)
            raise SystemExit(EXIT_STOPPED) from None

    def _global(self, position: dict[str, Any]) -> dict[str, Any]:
        """The run's data position, from those of all processes at the same step."""
        mesh = self.state.params["wte"].sharding.mesh
        shares = dict(gather_json([data_share(mesh)[0], position]))
        states = [shares[index] for index in sorted(shares)]
        return merge_states(states) if "shards" in position else states[0]

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
            "loop": dataclasses.asdict(self.totals),
            "config": dataclasses.asdict(job.config),
            "position": self._global(position) if position else {},
        }
        assert not own.keys() & job.metadata.keys()
        self._reporter.log.copy()
        self.checkpoints.save(
            step,
            saved_form(self.state.params),
            saved_form(self.state.optimizer),
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


@contextlib.contextmanager
def _directories(job: Job) -> Iterator[Job]:
    """The job with writable directories: the tag's, or temporary ones for a dry run."""
    if not job.dry_run:
        claim_directory(job.directory, resume=job.config.resuming, fresh=job.config.fresh)
        yield job
        return
    with tempfile.TemporaryDirectory(prefix="dry-run-") as scratch:
        yield dataclasses.replace(job, directory=Path(scratch), logs=Path(scratch), tokenizer=None)


@contextlib.contextmanager
def _explained(job: Job, mesh: jax.sharding.Mesh, checkpoints: Checkpoints) -> Iterator[None]:
    """Add advice to errors of the loop."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            raise out_of_memory(job.shape, mesh) from error
        raise
    except UsageError as error:
        with contextlib.suppress(UsageError):
            checkpoints.wait()
        raise UsageError(
            f"{error} (the last good checkpoint is step {checkpoints.last_step()} in "
            f"{job.directory})"
        ) from error

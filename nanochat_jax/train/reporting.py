"""Output of the training loop: metrics.jsonl, the progress display, the section of the report."""

import collections
import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.errors import UsageError, naming
from nanochat_jax.metrics import Display, MetricsLog, peak_flops, peak_memory_bytes
from nanochat_jax.model.size import flops_per_token
from nanochat_jax.paths import Paths
from nanochat_jax.report import sections
from nanochat_jax.train.job import Job, Outcome, StepBatch


@dataclass
class Totals:
    """Sums over a run's steps. They are saved in checkpoints, so a resumed run continues them."""

    minimum: float = math.inf  # of the primary metric
    smooth_loss: float = 0.0
    seconds: float = 0.0
    timed_steps: int = 0

    def add_step(self, loss: float, seconds: float) -> None:
        self.smooth_loss = 0.9 * self.smooth_loss + 0.1 * loss
        self.seconds += seconds
        self.timed_steps += 1

    def mean_loss(self, steps: int) -> float:
        """The smoothed loss after `steps` steps, without the bias of its start at 0."""
        return self.smooth_loss / (1.0 - 0.9**steps)


class Reporter:
    """Logs and displays the metrics of finished steps; rejects non-finite values.

    `resumed_at`: the step that the run continues from; None: it is new.
    """

    def __init__(
        self,
        job: Job,
        totals: Totals,
        resumed_at: int | None,
        mesh: jax.sharding.Mesh,
        tracker_run: Any,
    ) -> None:
        self._job, self._totals, self._tracker = job, totals, tracker_run
        self.log = MetricsLog(
            job.logs / "metrics.jsonl",
            resume_step=resumed_at,
            steps=job.directory,
            tracker_run=tracker_run,
        )
        self.display = Display(job.name, job.num_steps, start=resumed_at or 0)
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
        figures: dict[str, Any] = batch.figures | {
            name: float(value) for name, value in metrics.items()
        }
        now = time.perf_counter()
        self._laps.append(now - self._mark)
        self._mark = now
        self._require_finite(step, figures, batch)
        self._totals.add_step(figures["loss"], self._laps[-1])
        seconds = sum(self._laps) / len(self._laps)
        shown = {name: f"{figures[name]:.3f}" for name in self._job.shown}
        if self._job.shape:
            rate, mfu = self._speed(seconds)
            figures |= {
                "supervised": int(figures["tokens"]),
                "tokens": (step + 1) * self._job.shape.tokens,
                "position": position,
                "tokens_per_sec": rate,
                "mfu": "n/a" if mfu is None else mfu,
            }
            shown |= {
                "loss": f"{self._totals.mean_loss(step + 1):.4f}",
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

    def _require_finite(self, step: int, figures: dict[str, Any], batch: StepBatch) -> None:
        loss, norm = figures["loss"], figures["grad_norm"]
        if math.isfinite(loss) and math.isfinite(norm):
            return
        dump = self._job.logs / f"bad-batch-{step}-{jax.process_index()}.npz"
        dump.parent.mkdir(parents=True, exist_ok=True)
        with naming(dump):
            np.savez(dump, **cast(dict[str, Any], batch.host))
        raise UsageError(
            f"the loss of step {step} is {loss}, the gradient's norm {norm}; the batch is in {dump}"
        )

    def _speed(self, seconds: float) -> tuple[float, float | None]:
        """(tokens per second, MFU) of steps that take so long."""
        assert self._job.shape is not None
        rate = self._job.shape.tokens / seconds if seconds else 0.0
        return rate, flops_per_token(self._job.model) * rate / self.peak if self.peak else None

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        if self._job.primary in figures:
            self._totals.minimum = min(self._totals.minimum, figures[self._job.primary])
        spent: dict[str, float] = {"total_training_time": self._totals.seconds}
        if self._job.shape:
            tokens = step * self._job.shape.tokens
            spent["total_training_flops"] = float(flops_per_token(self._job.model)) * tokens
        self.log.write(step=step, kind="eval", time=time.time(), **spent, **figures)
        texts = [f"{name} {value:.4f}" for name, value in figures.items()]
        if len(texts) > 6:  # such as RL's pass@k for each k; metrics.jsonl has all
            texts[4:-1] = ["..."]
        self.display.note(f"{self._job.name} step {step}: " + ", ".join(texts))

    def outcome(self, params: Any, last: dict[str, float]) -> Outcome:
        totals = self._totals
        rate, mfu = 0.0, None
        if self._job.shape and totals.timed_steps:
            rate, mfu = self._speed(totals.seconds / totals.timed_steps)
        return Outcome(
            params=params,
            last=last,
            minimum=totals.minimum,
            train_loss=totals.mean_loss(self._job.num_steps),
            seconds=totals.seconds,
            tokens_per_sec=rate,
            mfu=mfu,
            peak_memory=peak_memory_bytes(),
        )

    def close(self) -> None:
        self.display.close()
        self.log.close()
        if self._tracker is not None:
            self._tracker.finish()


def log_training(job: Job, paths: Paths, section: str, results: Mapping[str, Any]) -> None:
    """Write a finished stage's section of the report, from process 0; a dry run writes none."""
    if jax.process_index() == 0 and not job.dry_run:
        sections.log_section(
            paths.report,
            section,
            [dataclasses.asdict(job.config), results],
            stage=job.name,
            results=results,
            curves=job.logs / "metrics.jsonl",
        )

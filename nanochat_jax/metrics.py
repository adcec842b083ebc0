"""Output of a run: metrics.jsonl, progress display, trackers; and the device's peak rates."""

import contextlib
import importlib
import json
import logging
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from nanochat_jax.errors import UsageError, explaining, naming, one_line
from nanochat_jax.files import write_file
from nanochat_jax.storage import Directory, is_remote

log = logging.getLogger(__name__)

# The module of each tracker, with its name for people.
TRACKERS = {"wandb": "Weights & Biases", "trackio": "Trackio", "none": "nothing"}
# (dense bfloat16 FLOP/s, memory bytes/s) by a name that the lower-case device kind contains. The
# first match counts. From the vendors' data sheets, halved where they count sparsity (H100, H200:
# 1,979e12, B200: 4.5e15).
PEAKS = {
    "gb200": (2.5e15, 8e12),
    "b200": (2.25e15, 8e12),
    "b100": (1.8e15, 8e12),
    "h200 nvl": (836e12, 4.8e12),
    "h200 pcie": (836e12, 4.8e12),
    "h200": (989e12, 4.8e12),
    "h100 nvl": (835e12, 3.9e12),
    "h100 pcie": (756e12, 2e12),
    "h100": (989e12, 3.35e12),
    "h800 nvl": (989e12, 3.35e12),
    "h800 pcie": (756e12, 2e12),
    "h800": (756e12, 3.35e12),
    "a100": (312e12, 2e12),
    "a800": (312e12, 2e12),
    "a40": (149.7e12, 0.696e12),
    "a30": (165e12, 0.933e12),
    "l40s": (362e12, 0.864e12),
    "l40": (181e12, 0.864e12),
    "l4": (121e12, 0.3e12),
    "5090": (209.5e12, 1.79e12),
    "4090": (165.2e12, 1.01e12),
    "3090": (71e12, 0.936e12),
    "mi355x": (2.5e15, 8e12),
    "mi325x": (1.3074e15, 6e12),
    "mi300x": (1.3074e15, 5.3e12),
    "mi300a": (980.6e12, 5.3e12),
    "mi250x": (383e12, 3.28e12),
    "mi250": (362.1e12, 3.28e12),
    "v6 lite": (918e12, 1.64e12),
    "v6e": (918e12, 1.64e12),
    "v5 lite": (197e12, 0.819e12),
    "v5e": (197e12, 0.819e12),
    "v5p": (459e12, 2.765e12),
    "v5": (459e12, 2.765e12),
    "v4": (275e12, 1.2e12),
    "v3": (123e12, 0.9e12),
    "v2": (45e12, 0.7e12),
}

PLAIN_SECONDS = 10.0  # between progress lines without a terminal


def _peaks(device: jax.Device) -> tuple[float | None, float | None]:
    kind = device.device_kind.lower()
    for name, peaks in PEAKS.items():
        # whole words: an A4000 is not an A40
        if device.platform != "cpu" and re.search(rf"\b{name}\b", kind):
            return peaks
    return None, None


def peak_flops(device: jax.Device) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device; None if unknown (a CPU, an unlisted chip)."""
    return _peaks(device)[0]


def peak_bandwidth(device: jax.Device) -> float | None:
    """Peak bytes/s of one device's memory; None if unknown."""
    return _peaks(device)[1]


def peak_memory_bytes() -> int:
    """Peak memory of the first local device; on a CPU, of the process."""
    import resource  # which Windows lacks; only inference runs there

    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return (
        stats.get("peak_bytes_in_use") or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )


class MetricsLog:
    """Writes one JSON object per line, in process 0.

    A resumed run drops the lines from the restored step on. If the run's steps (`steps`) are in a
    bucket, a copy of the file is saved next to them.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int | None,
        steps: Directory | None = None,
        tracker_run: Any = None,
    ) -> None:
        self.path = path
        self._tracker = tracker_run
        self._file = None
        self._copy = steps / path.name if steps is not None and is_remote(steps) else None
        if jax.process_index() != 0:
            return
        kept = []
        # the run may have been on another machine
        if resume_step is not None and self._copy is not None and self._copy.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._copy.read_bytes())
        if resume_step is not None and path.exists():
            kept = [line for line in read_metrics(path) if line["step"] < resume_step]
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self.copy()

    def write(self, **values: Any) -> None:
        if self._file is None:
            return
        with naming(self.path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        if self._tracker is not None:
            numbers = {
                f"{values['kind']}/{name}": value
                for name, value in values.items()
                if isinstance(value, (int, float)) and name != "step"
            }
            self._tracker.log(numbers, step=values["step"])

    def copy(self) -> None:
        """Update the copy in the bucket, if there is one. Raises `UsageError` if that fails."""
        if self._file is None or self._copy is None:
            return
        what, advice = f"{self._copy} could not be written", "fix that, then continue with `resume`"
        with explaining(what, advice, Exception):  # any error of the network
            self._copy.write_bytes(self.path.read_bytes())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            try:
                self.copy()
            except UsageError as error:  # does not fail the run: the last save made a copy
                log.warning("%s", error)


class Profiler:
    """Traces a range of steps for xprof (`tensorboard --logdir`, or the xprof package)."""

    def __init__(self, steps: range, directory: Path) -> None:
        self._steps, self._directory, self._running = steps, directory, False

    def changes_at(self, step: int) -> bool:
        """Whether tracing starts or stops before this step; earlier steps must be finished then."""
        return len(self._steps) > 0 and step in (self._steps.start, self._steps.stop)

    def at(self, step: int) -> None:
        if step in self._steps and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif step not in self._steps:
            self.close()

    def annotate(self, step: int) -> Any:
        return (
            jax.profiler.StepTraceAnnotation("train", step_num=step)
            if self._running
            else contextlib.nullcontext()
        )

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            log.info("the trace is in %s", self._directory)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in file order.

    Damaged or incomplete lines are skipped with a warning, so a log never blocks a run.
    """
    rows, damaged = [], 0
    for line in path.read_bytes().decode(errors="replace").split("\n"):
        # a power cut may leave zeros before a later line
        text = line.strip("\0 \t\r")
        if not line:
            continue
        try:
            row = json.loads(text)
            if not math.isfinite(row["step"]):
                raise ValueError("not a step")
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
    if damaged:
        log.warning("%s: skipped %d damaged lines", path, damaged)
    return rows


def start_tracker(
    tracker: str | None, run: str, project: str, tag: str, config: dict[str, Any]
) -> Any:
    """A run of wandb, or of trackio, which has the same interface; None without a tracker.

    The default is wandb if `run` is not "dummy". The run's name is `run`, or else `tag`.
    """
    tracker = tracker or ("none" if run == "dummy" else "wandb")
    if tracker == "none" or jax.process_index() != 0:
        return None
    try:
        module = importlib.import_module(tracker)
    except ImportError as error:
        chosen = f"`run={run}`" if tracker == "wandb" and run != "dummy" else f"`tracker={tracker}`"
        raise UsageError(
            f"{chosen} logs to {TRACKERS[tracker]}, which is not installed ({one_line(error)}): "
            f"`pip install {tracker}`, or set `tracker=none`"
        ) from error
    return module.init(project=project, name=tag if run == "dummy" else run, config=config)


def format_count(number: float) -> str:
    """A large number in short form: 512, 16k, 5,221.9M."""
    if number >= 1e6:
        return f"{number / 1e6:,.1f}M"
    return f"{number / 1e3:,.0f}k" if number >= 1e3 else f"{number:.0f}"


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Display:
    """Progress of a loop: a live bar on a terminal, else a line every few seconds."""

    def __init__(self, stage: str, total: int, *, start: int = 0) -> None:
        self._stage, self.total, self._start = stage, total, start
        self._began, self._last = time.monotonic(), float("-inf")
        self._bar: Progress | None = None
        # process 0 only: `devices.start` sets the log levels
        enabled = log.isEnabledFor(logging.INFO)
        if enabled and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None, complete_style="cyan"),
                MofNCompleteColumn(),
                TextColumn("{task.fields[info]}"),
                console=Console(stderr=True),
                expand=True,
            )
            self._task = self._bar.add_task(stage, total=total, completed=start, info="starting")
            self._bar.start()

    def update(self, step: int, **shown: str) -> None:
        """Display that `step` steps are done. `shown`: short texts to display, by name."""
        now, done, left = time.monotonic(), step - self._start, "?"
        if done > 0:
            left = format_seconds((now - self._began) / done * (self.total - step))
        info = " · ".join([*(f"{name} {text}" for name, text in shown.items()), f"{left} left"])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=self.total, info=info)
        elif now - self._last >= PLAIN_SECONDS or step == self.total:
            self._last = now
            log.info("%s %d/%d · %s", self._stage, step, self.total, info)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            log.info("%s", text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

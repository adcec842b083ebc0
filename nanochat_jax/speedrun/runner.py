"""Running the stages that are not finished, and the record of those that are.

The record is `speedrun.json` in the base directory. A second run skips finished stages, and a
killed run resumes within a stage.
"""

import json
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_jax.errors import UsageError
from nanochat_jax.files import LOCK, keep_old, lock_file, parse_json, set_aside, write_file
from nanochat_jax.metrics import format_seconds
from nanochat_jax.paths import Paths, delete_steps, refuse_foreign
from nanochat_jax.speedrun.stages import Stage, stage_keys


@dataclass
class Record:
    """Keys of the finished and started stages of a run."""

    path: Path
    run: str = field(default_factory=lambda: secrets.token_hex(8))
    finished: dict[str, str] = field(default_factory=dict)
    begun: dict[str, str] = field(default_factory=dict)
    fresh: bool = False  # of this start only: existing checkpoints may be deleted

    @classmethod
    def open(cls, paths: Paths, *, fresh: bool) -> "Record":
        path = paths.base / "speedrun.json"
        if not path.exists():
            return cls(path, fresh=fresh)
        try:
            record = cls(path, **parse_json(path.read_bytes()))
            return cls(path, fresh=True) if fresh else record
        except (ValueError, TypeError) as error:
            if fresh:
                keep_old(path)
                return cls(path, fresh=True)
            raise UsageError(
                f"{path} is not the record of a run ({error}): delete it to start over; existing "
                "checkpoints are then renamed, not deleted"
            ) from error

    def write(self) -> None:
        state = {"run": self.run, "finished": self.finished, "begun": self.begun}
        write_file(self.path, json.dumps(state, indent=1))


def time_left(rest: float, *, planned: float, taken: float) -> float:
    """Estimated seconds of the remaining stages, planned to take `rest`.

    The estimate is scaled by how `taken`, the seconds of finished stages, compares to `planned`;
    less so if these are a small part of the pipeline.
    """
    return rest * (taken + rest) / (planned + rest) if rest else 0.0


def clear_tag(directory: Path, *, delete: bool) -> None:
    """Make room for a stage. Unless `delete` is set, existing steps are moved, not deleted."""
    refuse_foreign(directory)
    with lock_file(directory / LOCK, str(directory), "wait for it or stop it"):
        if delete:
            delete_steps(directory)
        elif kept := set_aside(directory, ".replaced"):
            headline(f"{directory} holds the steps of another run: moved to {kept}")


def run_stages(stages: list[Stage], record: Record) -> int:
    """Run the unfinished stages in order; returns the exit code of the first that fails, or 0."""
    run = _Run(stages, record)
    # for a signal between two stages
    old = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return run.all()
    finally:
        signal.signal(signal.SIGTERM, old)
        for process in run.background.values():
            process.stop()


class _Run:
    def __init__(self, stages: list[Stage], record: Record) -> None:
        self.stages, self.record = stages, record
        self.keys = stage_keys(stages, record.run)
        self.background: dict[str, Background] = {}
        self._start = time.monotonic()
        self._planned = self._taken = 0.0  # seconds of finished stages that have an estimate

    def all(self) -> int:
        if not self.record.begun:
            if code := call([sys.executable, "-m", "nanochat_jax.report", "reset"]):
                return code
        for number, stage in enumerate(self.stages, 1):
            label = f"[{number}/{len(self.stages)}] {stage.name}"
            if self.record.finished.get(stage.name) == self.keys[stage.name]:
                headline(f"{label}: already finished")
                continue
            if code := self._wait_for(stage.waits_for, label):
                return code
            self._mark_started(stage)
            if stage.background:
                log = self.record.path.with_name(f"{stage.name}.log")
                self.background[stage.name] = Background(stage.command(), log)
                headline(f"{label} · {stage.note} · in the background, see {log}")
                continue
            self._announce(stage, label, rest=self.stages[number - 1 :])
            if code := self._run(stage):
                return code
        headline(f"all {len(self.stages)} stages done in {self._elapsed()}")
        return 0

    def _elapsed(self) -> str:
        return format_seconds(time.monotonic() - self._start)

    def _announce(self, stage: Stage, label: str, rest: list[Stage]) -> None:
        seconds = sum(later.seconds for later in rest)
        left = time_left(seconds, planned=self._planned, taken=self._taken)
        estimate = f", about {format_seconds(left)} left in all" if left else ""
        headline(f"{label} · {stage.note or stage.text()} · {self._elapsed()} so far{estimate}")

    def _wait_for(self, name: str, label: str) -> int:
        """Wait until a background stage ends, if it runs; returns its exit code."""
        if name not in self.background:
            return 0
        process = self.background.pop(name)
        headline(f"{label}: waits for {name} (see {process.log})")
        if code := process.wait():
            return _failed(next(stage for stage in self.stages if stage.name == name), code)
        self.record.finished[name] = self.keys[name]
        return 0

    def _mark_started(self, stage: Stage) -> None:
        key, record = self.keys[stage.name], self.record
        record.finished.pop(stage.name, None)
        # existing steps belong to another run
        if stage.checkpoints and record.begun.pop(stage.name, None) != key:
            record.write()
            clear_tag(record.path.parent / stage.checkpoints, delete=record.fresh)
        record.begun[stage.name] = key
        record.write()

    def _run(self, stage: Stage) -> int:
        start = time.monotonic()
        if code := call(stage.command(*(["--resume"] if stage.checkpoints else []))):
            return _failed(stage, code)
        if stage.seconds:
            self._planned += stage.seconds
            self._taken += time.monotonic() - start
        self.record.finished[stage.name] = self.keys[stage.name]
        self.record.write()
        return 0


def _failed(stage: Stage, code: int) -> int:
    print(
        f"error: {stage.name} ended with exit code {code}; run the same command again to continue "
        f"from here ({stage.text()})",
        file=sys.stderr,
    )
    return code


def headline(text: str) -> None:
    bold, plain = ("\x1b[1m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{bold}{text}{plain}", file=sys.stderr, flush=True)


def call(command: list[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a stage on this terminal; returns its exit code. `environment`: default the same.

    Ctrl-C reaches it through the terminal, and SIGTERM is forwarded. The stage is not killed: it
    saves and exits.
    """
    process = subprocess.Popen(command, env=environment)
    old = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, old)


class Background:
    """A stage that runs beside the others."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def wait(self) -> int:
        code = self._process.wait()
        if code:
            lines = self.log.read_text(errors="replace").splitlines()
            print("\n".join(lines[-10:]), file=sys.stderr)
        return code

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

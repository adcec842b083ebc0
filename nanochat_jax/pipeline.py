"""The pipeline of stages: the command of each, which are finished, and estimated times.

Finished stages are recorded in `speedrun.json` under the base directory. A stage's key is a hash of
its command and of those of the stages it builds on. So a second run skips finished stages, a killed
run resumes within a stage, and a changed setting reruns only what depends on it.
"""

import hashlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from nanochat_jax.devices import find_devices
from nanochat_jax.errors import UsageError
from nanochat_jax.files import LOCK, keep_old, lock_file, parse_json, set_aside, write_file
from nanochat_jax.metrics import format_seconds, peak_flops
from nanochat_jax.paths import Paths, delete_steps, refuse_foreign

MODEL_FLOPS_UTILIZATION = 0.4  # assumed if the device's peak is known
# float32 training on x86 cores: 5e10 on a busy machine to 1.1e11 on an idle one
CPU_FLOPS_PER_CORE = 8e10


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the pipeline.

    `args` decide the result and are part of the key; `placement` (mesh, logging, batch per device)
    is not. Later stages build on a stage with `produces`. A `background` stage runs beside the
    later ones, until the one that `waits_for` it.
    """

    name: str
    module: str
    args: tuple[str, ...] = ()
    placement: tuple[str, ...] = ()
    produces: bool = False
    checkpoints: str = ""  # directory of its checkpoints under the base directory, if any
    background: bool = False
    waits_for: str = ""
    note: str = ""  # for the plan: model size, tokens, steps
    seconds: float = 0.0  # estimated; 0: unknown

    def command(self, *more: str) -> list[str]:
        return [sys.executable, "-m", self.module, *self.args, *self.placement, *more]

    def text(self) -> str:
        return shlex.join(["python", *self.command()[1:]])


def describe_devices(device_type: str | None) -> None:
    """Print platform, kind, number and peak FLOP/s of the devices as a JSON line."""
    if device_type:
        jax.config.update("jax_platforms", device_type)
    devices = find_devices(device_type)
    print(
        json.dumps(
            [devices[0].platform, devices[0].device_kind, len(devices), peak_flops(devices[0])]
        )
    )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The devices of the stages, found in a separate process: only one process can hold a TPU."""

    platform: str
    kind: str
    count: int
    peak_flops: float | None

    @classmethod
    def probe(cls, device_type: str | None = None) -> "Machine":
        code = (
            "from nanochat_jax import cli, pipeline; "
            f"cli.guard(lambda: pipeline.describe_devices({device_type!r}))"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if found.returncode:
            raise UsageError(
                next(
                    (
                        line.removeprefix("error: ")
                        for line in found.stderr.splitlines()
                        if line.startswith("error: ")
                    ),
                    f"JAX does not start on this machine: {found.stderr}",
                )
            )
        platform, kind, count, peak = json.loads(found.stdout.splitlines()[-1])
        return cls(platform=platform, kind=kind, count=count, peak_flops=peak)

    @property
    def training_flops(self) -> float:
        """Expected FLOP/s of all devices together."""
        if self.platform == "cpu":
            return CPU_FLOPS_PER_CORE * (os.cpu_count() or 1)
        return (self.peak_flops or 1e14) * MODEL_FLOPS_UTILIZATION * self.count


def print_plan(stages: Sequence[Stage], machine: Machine, title: str) -> None:
    print(title)
    print(f"machine: {machine.count} x {machine.kind} ({machine.platform})")
    total = 0.0
    for number, stage in enumerate(stages, 1):
        total += stage.seconds
        where = "in the background" if stage.background else ""
        estimate = f"about {format_seconds(stage.seconds)}" if stage.seconds else ""
        print(
            f"{number:3d}. {stage.name:14s} "
            f"{'; '.join(filter(None, [stage.note, where, estimate]))}"
        )
        print(f"     {stage.text()}")
    unknown = [stage.name for stage in stages if not (stage.seconds or stage.background)]
    without = f", without {', '.join(unknown)}" if unknown else ""
    print(
        f"estimated time in all{without}: {format_seconds(total)} (an estimate from FLOPs, not a "
        "measurement)"
    )


@dataclass
class Record:
    """Keys of the finished and begun stages of a run."""

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
                f"{path} is not a record of a run ({error}): delete it to start over; what was "
                "trained is then "
                "kept aside"
            ) from error

    def write(self) -> None:
        write_file(
            self.path,
            json.dumps({"run": self.run, "finished": self.finished, "begun": self.begun}, indent=1),
        )


def stage_keys(stages: Iterable[Stage], run: str) -> dict[str, str]:
    """A key per stage, from its own arguments and those of the producing stages before it."""
    keys, chain = {}, run
    for stage in stages:
        keys[stage.name] = hashlib.sha256(
            json.dumps([chain, stage.module, stage.args]).encode()
        ).hexdigest()
        if stage.produces:
            chain = keys[stage.name]
    return keys


def time_left(rest: float, *, planned: float, taken: float) -> float:
    """Estimated seconds of the remaining stages, planned to take `rest`.

    The estimate is scaled by how `taken`, the seconds of finished stages, compares to `planned`;
    less so if these are a small part of the pipeline.
    """
    return rest * (taken + rest) / (planned + rest) if rest else 0.0


def run_stages(stages: list[Stage], record: Record) -> int:
    """Run the unfinished stages in order; returns the exit code of the first that fails, or 0."""
    background: dict[str, Background] = {}
    # for a signal between two stages
    old = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return _run_stages(stages, record, background)
    finally:
        signal.signal(signal.SIGTERM, old)
        for process in background.values():
            process.stop()


def _clear(directory: Path, *, delete: bool) -> None:
    """Make room for a stage. Unless `delete` is set, existing steps are moved, not deleted."""
    refuse_foreign(directory)
    with lock_file(directory / LOCK, str(directory), "wait for it or stop it"):
        if delete:
            delete_steps(directory)
        elif kept := set_aside(directory, ".replaced"):
            _headline(f"{directory} holds the steps of another run: kept in {kept}")


def _run_stages(stages: list[Stage], record: Record, background: "dict[str, Background]") -> int:
    keys = stage_keys(stages, record.run)
    began = time.monotonic()
    planned = taken = 0.0  # seconds of finished stages that have an estimate
    if not record.begun:
        if code := _call([sys.executable, "-m", "nanochat_jax.report", "reset"]):
            return code

    def failed(stage: Stage, code: int) -> int:
        print(
            f"error: {stage.name} ended with exit code {code}; run the same command again to go "
            "on from here "
            f"({stage.text()})",
            file=sys.stderr,
        )
        return code

    for number, stage in enumerate(stages, 1):
        key, label = keys[stage.name], f"[{number}/{len(stages)}] {stage.name}"
        if record.finished.get(stage.name) == key:
            _headline(f"{label}: finished before")
            continue
        if stage.waits_for in background:
            waited = next(other for other in stages if other.name == stage.waits_for)
            _headline(f"{label}: waits for {waited.name} (see {background[waited.name].log})")
            if code := background.pop(waited.name).wait():
                return failed(waited, code)
            record.finished[waited.name] = keys[waited.name]
        record.finished.pop(stage.name, None)
        # existing steps belong to another run
        if stage.checkpoints and record.begun.pop(stage.name, None) != key:
            record.write()
            _clear(record.path.parent / stage.checkpoints, delete=record.fresh)
        record.begun[stage.name] = key
        record.write()
        if stage.background:
            background[stage.name] = Background(
                stage.command(), record.path.with_name(f"{stage.name}.log")
            )
            _headline(
                f"{label} · {stage.note} · in the background, see {background[stage.name].log}"
            )
            continue
        left = time_left(
            sum(later.seconds for later in stages[number - 1 :]), planned=planned, taken=taken
        )
        _headline(
            f"{label} · {stage.note or stage.text()} · {format_seconds(time.monotonic() - began)} "
            "so far" + (f", about {format_seconds(left)} left in all" if left else "")
        )
        started = time.monotonic()
        code = _call(stage.command(*(["--resume"] if stage.checkpoints else [])))
        if code:
            return failed(stage, code)
        if stage.seconds:
            planned, taken = planned + stage.seconds, taken + time.monotonic() - started
        record.finished[stage.name] = key
        record.write()
    _headline(f"all {len(stages)} stages done in {format_seconds(time.monotonic() - began)}")
    return 0


def _headline(text: str) -> None:
    bold, plain = ("\x1b[1m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{bold}{text}{plain}", file=sys.stderr, flush=True)


def _call(command: list[str]) -> int:
    """Run a stage on this terminal; returns its exit code.

    Ctrl-C reaches it through the terminal, and SIGTERM is forwarded. The stage is not killed: it
    saves and exits.
    """
    process = subprocess.Popen(command)
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
    """A stage that runs beside the others.

    Its output goes to a file, and the end of that is printed if it fails.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def wait(self) -> int:
        code = self._process.wait()
        if code:
            print(
                "\n".join(self.log.read_text(errors="replace").splitlines()[-10:]), file=sys.stderr
            )
        return code

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


def as_flags(**values: Any) -> tuple[str, ...]:
    """Keyword arguments as command-line flags; None and False are omitted."""
    flags: list[str] = []
    for name, value in values.items():
        if value is not None and value is not False:
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return tuple(flags)

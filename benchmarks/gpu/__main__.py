"""Measure one GPU in at most nine minutes.

    bash benchmarks/gpu.sh --out results
    bash benchmarks/gpu.sh --tiny                 rehearsal at a tiny size, also on a CPU

Every result is one JSON line in FOLDER/gpu.jsonl, on disk as soon as it is known. Each run is a
separate process with a hard time limit; a run that fails, crashes or hangs is recorded, its
log is in FOLDER/gpu-logs, and the next run starts. docs/benchmarks.md explains the results.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import PHASES, Phase, Run
from benchmarks.gpu.record import FILE_NAME, Recorder, read_results
from benchmarks.gpu.summary import summarize

LEAST_SECONDS = 5.0  # a run that has less left is not started


@dataclass(frozen=True)
class Options:
    out: Path
    cache: Path
    phases: tuple[Phase, ...]
    limit_scale: float
    tiny: bool

    @property
    def results(self) -> Path:
        return self.out / FILE_NAME

    def log(self, phase: Phase, run: Run) -> Path:
        return self.out / "gpu-logs" / f"{phase.name}-{run.name}.log"


def parse() -> Options:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "."),
        help="folder for the results (default: $OUT, else the current directory)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "nanochat_jax-gpu-cache",
        help="folder of compiled programs, shared by all runs (default: %(default)s)",
    )
    names = [phase.name for phase in PHASES]
    parser.add_argument(
        "--phases", default=",".join(names), help="phases to run, a list (default: %(default)s)"
    )
    parser.add_argument(
        "--limit-scale",
        type=float,
        default=1.0,
        help="factor of all time limits (default: 1; the limits add up to 530 s)",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes: a rehearsal, which also runs on a CPU"
    )
    given = parser.parse_args()
    chosen = given.phases.split(",")
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"--phases: unknown {', '.join(unknown)}; choose from {', '.join(names)}")
    if given.limit_scale <= 0:
        parser.error(f"--limit-scale must be above 0, got {given.limit_scale}")
    return Options(
        given.out.resolve(),
        given.cache.resolve(),
        tuple(phase for phase in PHASES if phase.name in chosen),
        given.limit_scale,
        given.tiny,
    )


def environment(options: Options, run: Run) -> dict[str, str]:
    """Environment of a run: JAX's memory and compilation cache, and the run's XLA flags."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {run.xla_flags}".strip()
    return {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(options.cache),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_CACHE_DIR": str(options.cache / "torch"),
    }


def kill_group(process: subprocess.Popen) -> None:
    """Kill the run and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def execute(options: Options, phase: Phase, run: Run, began: float, seconds: float) -> str:
    """Run a child for at most `seconds`; record how it ended and return its status."""
    log = options.log(phase, run)
    start = options.results.stat().st_size
    command = [
        sys.executable,
        "-u",
        "-m",
        "benchmarks.gpu.child",
        phase.name,
        run.name,
        "--out",
        str(options.out),
        "--began",
        str(began),
        "--seconds",
        str(seconds),
    ]
    command += ["--tiny"] if options.tiny else []
    started = time.monotonic()
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            command,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            env=environment(options, run),
            start_new_session=True,
        )
        try:
            process.wait(seconds)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            kill_group(process)
    errors = [line["error"] for line in read_results(options.results, start) if "error" in line]
    code = process.returncode
    end: dict[str, Any] = {"status": "ok"}
    if timed_out:
        end = {"status": "timeout", "error": f"no end within {seconds:.0f} s"}
    elif code < 0:
        end = {"status": "failed", "error": f"killed by {signal.Signals(-code).name}"}
    elif code:
        error = errors[-1] if errors else f"exit code {code}"
        end = {"status": "failed", "error": error}
    record = Recorder(options.out, phase.name, run.name, began)
    took = round(time.monotonic() - started, 1)
    record("end", **end, took=took, limit=round(seconds, 1), log=str(log.relative_to(options.out)))
    return end["status"]


def run_phases(options: Options, began: float) -> None:
    """Run all phases. The time that earlier phases left over is added to the later ones."""
    deadline = began
    for phase in options.phases:
        deadline += phase.seconds * options.limit_scale
        for run in phase.runs:
            left = deadline - time.time()
            if left < LEAST_SECONDS * options.limit_scale:
                record = Recorder(options.out, phase.name, run.name, began)
                record("end", status="skipped", error=f"{max(left, 0):.0f} s left in its phase")
                continue
            execute(options, phase, run, began, left)


def main() -> int:
    options = parse()
    (options.out / "gpu-logs").mkdir(parents=True, exist_ok=True)
    options.cache.mkdir(parents=True, exist_ok=True)
    began = time.time()
    start = options.results.stat().st_size if options.results.exists() else 0
    record = Recorder(options.out, "benchmark", "benchmark", began)
    record(
        "start",
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        tiny=options.tiny,
        limit_scale=options.limit_scale,
        phases=[phase.name for phase in options.phases],
        compiled_programs=len(list(options.cache.glob("*-cache"))),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        run_phases(options, began)
    except KeyboardInterrupt:
        record("interrupted", ok=False)
    bad = summarize(read_results(options.results, start))
    print(f"\n{time.time() - began:.0f} s, {bad} failed or wrong; results: {options.results}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

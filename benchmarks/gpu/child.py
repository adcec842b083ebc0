"""One run in a separate process: calls the function, records an exception in one line.

    python -m benchmarks.gpu.child PHASE RUN --out FOLDER --began TIME --seconds S [--tiny]

Standard error goes to the run's log: the traceback of an exception, the stacks of all threads on a
crash and one second before the time limit.
"""

import argparse
import faulthandler
import importlib
import signal
import sys
import traceback
from pathlib import Path

from benchmarks.gpu.plan import PHASES, TINY, Run, Size
from benchmarks.gpu.record import Recorder
from nanochat_jax.errors import one_line


def find_run(phase_name: str, run_name: str) -> Run:
    phase = next(phase for phase in PHASES if phase.name == phase_name)
    return next(run for run in phase.runs if run.name == run_name)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("phase")
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--began", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()

    faulthandler.enable()
    faulthandler.dump_traceback_later(max(0.1, options.seconds - 1.0))
    signal.alarm(int(options.seconds) + 2)  # ends this process if its parent was killed
    run = find_run(options.phase, options.run)
    record = Recorder(options.out, options.phase, run.name, options.began)
    try:
        module, function = run.function.split(":")
        measure = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
        measure(record, TINY if options.tiny else Size(), **run.arguments)
    except Exception as error:
        traceback.print_exc()
        record("error", error=f"{type(error).__name__}: {one_line(error)}"[:300])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

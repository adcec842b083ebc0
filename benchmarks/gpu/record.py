"""The result file: one JSON object per line, on disk before the next measurement starts."""

import json
import os
import time
from pathlib import Path
from typing import Any

FILE_NAME = "gpu.jsonl"


class Recorder:
    """Appends results of one run of one phase to the result file, and prints each for people.

    Several processes append to the file in turn; each line is a single write.

    Args:
        folder: where the result file is.
        phase, run: what is measured; part of every line.
        began: `time.time()` at the start of the benchmark.
    """

    def __init__(self, folder: Path, phase: str, run: str, began: float) -> None:
        self._path = folder / FILE_NAME
        self._labels = {"phase": phase, "run": run}
        self._began = began

    def __call__(self, name: str, **values: Any) -> None:
        """Record the values measured under `name`. `ok=False` marks a wrong result."""
        at = round(time.time() - self._began, 1)
        line = json.dumps(self._labels | {"name": name, "at": at} | values, default=str)
        with self._path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        label = "/".join(dict.fromkeys(self._labels.values()))
        print(f"[{at:6.1f} s] {label} {name}: {describe(values)}", flush=True)


def read_results(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """The complete lines of the result file from byte `start` on."""
    if not path.exists():
        return []
    lines = path.read_bytes()[start:].split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def describe(values: dict[str, Any]) -> str:
    """Values in one short line; lists and tables are only counted."""
    return ", ".join(f"{name} {short(value)}" for name, value in values.items())


def short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "NO", None: "n/a"}[value]
    if isinstance(value, (list, dict)):
        return f"({len(value)})"
    if isinstance(value, int):
        return f"{value:,}"
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )

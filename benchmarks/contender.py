"""One side of a comparison: a worker process that measures on request."""

import json
import subprocess
import sys
from typing import Any


class Contender:
    """Runs this benchmark again with `--worker NAME`.

    The worker answers each line of its input with a line of JSON.
    """

    def __init__(self, name: str) -> None:
        command = [sys.executable, *sys.argv, "--worker", name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *words: float) -> Any:
        print(*words, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"a contender ended with exit code {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

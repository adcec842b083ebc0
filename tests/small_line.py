"""A corpus and a tokenizer so small that a training script runs in seconds."""

import json
import os
import random
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat_jax.data.shards import write_shards
from nanochat_jax.metrics import read_metrics
from nanochat_jax.paths import Paths
from nanochat_jax.tokenizer import Tokenizer

WORDS = "apple banana river mountain letter window garden silver people government summer".split()
# A model with 8 heads, so that it can be cut into 8 along the model axis.
MODEL = "--depth 2 --aspect-ratio 16 --head-dim 4 --max-seq-len 64".split()


def make_base(base: Path) -> Paths:
    """A base directory with shards and a tokenizer."""
    rng, paths = random.Random(0), Paths(base)
    texts = [" ".join(rng.choice(WORDS) for _ in range(60)) for _ in range(60)]
    write_shards(texts[:50], paths.data("embedded"), val_texts=texts[50:], rows_per_shard=25)
    words = dict.fromkeys(WORDS + [a + b for a in ("over", "under", "out") for b in WORDS])
    (paths.data("embedded") / "words.txt").write_text("\n".join(words))
    Tokenizer.train(texts, 300).save(paths.tokenizer)
    return paths


def start(
    script: str,
    *argv: str,
    base: Path | list[Path],
    devices: int = 1,
    processes: int = 1,
    env: dict[str, str] | None = None,
) -> list[subprocess.Popen]:
    """`python -m scripts.SCRIPT` in so many processes with so many virtual CPU devices each."""
    bases = base if isinstance(base, list) else [base] * processes
    env = (
        os.environ
        | (env or {})
        | {
            "JAX_PLATFORMS": "cpu",
            "OMP_WAIT_POLICY": "PASSIVE",
            # Compiling takes most of such a run's time, and no test looks at its programs.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
    )
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}",
                "JAX_NUM_PROCESSES": str(processes),
            }
    command = [sys.executable, "-m", f"scripts.{script}", *argv]
    return [
        subprocess.Popen(
            command,
            env=env | {"JAX_PROCESS_ID": str(i), "NANOCHAT_BASE_DIR": str(bases[i])},
            text=True,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        for i in range(processes)
    ]


def errors_of(running: list[subprocess.Popen]) -> list[str]:
    """The standard error of each, read at once: a full pipe stops its process."""
    with ThreadPoolExecutor(len(running)) as readers:
        return list(readers.map(lambda process: process.communicate()[1], running))


def run(script: str, *argv: str, **where) -> str:
    """The standard error of process 0 of a script that ends well."""
    running = start(script, *argv, **where)
    said = errors_of(running)
    assert all(process.returncode == 0 for process in running), "\n".join(said)
    return said[0]


def lines(directory: Path, kind: str) -> list[dict]:
    """A run's metrics, without what differs from run to run (times, memory)."""
    same = ("step", "loss", "grad_norm", "lrm", "tokens", "supervised", "position", "val_bpb")
    return [
        {key: line[key] for key in same if key in line}
        for line in read_metrics(directory / "metrics.jsonl")
        if line["kind"] == kind
    ]


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in lines(directory, "train")]


def saved_state(directory: Path, step: int) -> dict:
    """The JSON of a step, with the checksums of its arrays."""
    return json.loads((directory / str(step) / "state" / "metadata").read_text())

"""Data sets of the Hugging Face Hub, kept as parquet under the base directory.

    task_data/<owner>--<name>/<subset>/<split>/00000.parquet ... manifest.json

`manifest.json` is the list of the files, in order; the folder of a split appears by one rename. What is there is read
as it is, nothing is asked of the network.
"""

import http.client
import json
import logging
import os
import shutil
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.cli import NotFound, UsageError
from nanochat_jax.data.shards import fsync
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.base import Task

logger = logging.getLogger(__name__)

PARQUET_BRANCH = "refs/convert/parquet"  # where the Hub keeps every data set as <subset>/<split>/0000.parquet
SHUFFLE_SEED = 42
MANIFEST = "manifest.json"


def load_split(paths: Paths, repo: str, subset: str, split: str) -> pa.Table:
    """All rows of a split, in the files' order; fetched first if they are not under `paths.task_data`.

    Raises `NotFound`, naming the data set, if it cannot be had, and `UsageError` if what is there is torn or empty.
    """
    folder = paths.task_data / repo.replace("/", "--") / subset / split
    if not (folder / MANIFEST).exists():
        _fetch_split(repo, subset, split, folder)
    name = f"data set {repo} ({subset}, {split}) in {folder}"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        table = pa.concat_tables([pq.read_table(folder / file) for file in files]).combine_chunks()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UsageError(f"{name} is damaged ({error}): remove the folder to fetch it again") from error
    if not table.num_rows:
        raise UsageError(f"{name} has no rows: remove the folder to fetch it again")
    return table


def _fetch_split(repo: str, subset: str, split: str, folder: Path) -> None:
    logger.info("fetching %s (%s, %s)", repo, subset, split)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder.parent))
    try:
        try:
            names = _download(repo, f"{subset}/{split}/", aside)
        except Exception as error:  # the HTTP client's errors have no common class
            raise NotFound(f"data set {repo} ({subset}, {split}) is not in {folder} and could not be fetched: "
                           f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
        (aside / MANIFEST).write_text(json.dumps(names), encoding="utf-8")
        for name in (*names, MANIFEST):
            fsync(aside / name)
        aside.chmod(0o755)
        if folder.exists():  # without a manifest: a fetch that was torn, or a whole one by another process just now
            if (folder / MANIFEST).exists():
                return
            shutil.rmtree(folder)
        aside.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _download(repo: str, prefix: str, folder: Path) -> list[str]:
    """Put the parquet files under `prefix` into `folder` as 00000.parquet, ...; returns the names."""
    api = huggingface_hub.HfApi()
    listing = api.list_repo_files(repo, repo_type="dataset", revision=PARQUET_BRANCH)
    remote = sorted(name for name in listing if name.startswith(prefix) and name.endswith(".parquet"))
    if not remote:
        raise FileNotFoundError(f"the Hub has no parquet files {prefix}*.parquet of it")
    names = []
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        for i, name in enumerate(remote):
            fetched = api.hf_hub_download(repo, name, repo_type="dataset", revision=PARQUET_BRANCH, local_dir=staging)
            names.append(f"{i:05d}.parquet")
            shutil.move(fetched, folder / names[-1])
    return names


class HubTask(Task):
    """A task whose conversations are the rows of one split, in upstream's order: shuffled with seed 42."""

    def __init__(self, paths: Paths, repo: str, subset: str, split: str, **view: int) -> None:
        super().__init__(**view)
        self.table = load_split(paths, repo, subset, split)
        # The order of `datasets.Dataset.shuffle(seed=42)`.
        self.order = np.random.default_rng(SHUFFLE_SEED).permutation(self.table.num_rows)

    def num_examples(self) -> int:
        return self.table.num_rows

    def row(self, index: int) -> dict[str, Any]:
        return self.table.slice(int(self.order[index]), 1).to_pylist()[0]


def fetch_file(url: str, path: Path, *, timeout_s: float = 30.0) -> Path:
    """`path`, downloaded from `url` unless it exists; raises `NotFound` naming both if it cannot be had."""
    if path.exists():
        return path
    logger.info("fetching %s", url)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}-", dir=path.parent, delete=False) as aside:
        try:
            with urllib.request.urlopen(url, timeout=timeout_s) as response:
                aside.write(response.read())  # all at once: reading in pieces does not notice a cut connection
            aside.flush()
            os.fsync(aside.fileno())
            os.chmod(aside.name, 0o644)
            os.replace(aside.name, path)
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
            os.unlink(aside.name)
            raise NotFound(f"{path} does not exist and could not be fetched from {url} ({error}): "
                           "put the file there, or run where the network can be reached") from error
    return path

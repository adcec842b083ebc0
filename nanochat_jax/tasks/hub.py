"""Data sets of the Hugging Face Hub, each at one commit, kept as parquet under the base directory.

    task_data/<owner>--<name>/<subset>/<split>/00000.parquet ... manifest.json

`manifest.json` is the list of the files, in order; the folder of a split appears by one rename. What is there is read
as it is, nothing is asked of the network.
"""

import hashlib
import http.client
import json
import logging
import os
import shutil
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.utils import WeakFileLock

from nanochat_jax.cli import NotFound, UsageError
from nanochat_jax.data.hub import clean_up, fetch, first_line
from nanochat_jax.data.hub_dataset import glob_pattern, list_dataset
from nanochat_jax.files import fsync
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.base import Task

logger = logging.getLogger(__name__)

# Commit of each data set, and where a split's files lie in it: a benchmark must not change between two runs.
PINNED = {
    "allenai/ai2_arc": ("210d026faf9955653af8916fad021475a3f00453", "{subset}/{split}-*.parquet"),
    "cais/mmlu": ("c30699e8356da336a370243923dbaf21066bb9fe", "{subset}/{split}-*.parquet"),
    "openai/gsm8k": ("e53f048856ff4f594e959d75785d2c2d37b678ee", "{subset}/{split}-*.parquet"),
    "openai/openai_humaneval": ("7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", "{subset}/{split}-*.parquet"),
    "HuggingFaceTB/smol-smoltalk": ("f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc", "data/{split}-*.parquet"),
}
SHUFFLE_SEED = 42
MANIFEST = "manifest.json"
SOURCE = "source.json"  # repository, commit and names there, of what was fetched here


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
    revision, pattern = PINNED[repo]
    aside = folder.with_name(f".{split}.partial")  # what is in it after a failure is gone on with
    aside.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(aside.with_suffix(".lock")):
        if (folder / MANIFEST).exists():
            return  # another process has fetched it meanwhile
        logger.info("fetching %s (%s, %s)", repo, subset, split)
        try:
            wanted = glob_pattern(pattern.format(subset=subset, split=split))
            remote = [name for name in list_dataset(repo, revision).names if wanted.fullmatch(name)]
            if not remote:
                raise FileNotFoundError(f"it has no files {pattern.format(subset=subset, split=split)}")
            names = [f"{i:05d}.parquet" for i in range(len(remote))]
            for name, local in zip(remote, names, strict=True):
                if not (aside / local).exists():
                    fetch(repo, name, aside / local, revision=revision, check=_check_parquet)
        except Exception as error:  # the HTTP client's errors have no common class
            raise NotFound(f"data set {repo} ({subset}, {split}) is not in {folder} and could not be fetched: "
                           f"{first_line(error)}") from error
        clean_up(aside)
        source = {"repo": repo, "revision": revision, "files": remote}
        for name, content in ((SOURCE, source), (MANIFEST, names)):
            (aside / name).write_text(json.dumps(content), encoding="utf-8")
            fsync(aside / name)
        if folder.exists():  # without a manifest: a fetch that was torn
            shutil.rmtree(folder)
        aside.rename(folder)
        fsync(folder.parent)


def _check_parquet(path: Path) -> None:
    try:
        pq.ParquetFile(path).close()
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} is not a readable parquet file ({first_line(error)})") from error


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


def fetch_file(url: str, path: Path, *, sha256: str | None = None, timeout_s: float = 30.0) -> Path:
    """`path`, downloaded from `url` unless it exists, and then with the checksum `sha256` if that is given.

    Raises `NotFound`, naming both, if it cannot be had.
    """
    if path.exists():
        return path
    logger.info("fetching %s", url)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            content = response.read()  # all at once: reading in pieces does not notice a cut connection
        if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise ValueError(f"its checksum is {found}, expected {sha256}")
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}-", dir=path.parent) as aside:
            aside.write(content)
            aside.flush()
            os.fsync(aside.fileno())
            os.chmod(aside.name, 0o644)
            os.link(aside.name, path)
    except FileExistsError:
        pass  # another process was faster
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        raise NotFound(f"{path} does not exist and could not be fetched from {url} ({error}): "
                       "put the file there, or run where the network can be reached") from error
    return path

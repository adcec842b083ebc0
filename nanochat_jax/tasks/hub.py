"""Data sets of the Hugging Face Hub at pinned commits, cached as parquet in the base directory.

    task_data/<owner>--<name>/<subset>/<split>/00000.parquet ... manifest.json

`manifest.json` lists the files in order. A split is complete when it exists. Complete splits are
read without network access.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.data.hub import clean_up, fetch, first_line
from nanochat_jax.data.hub_dataset import glob_pattern, list_dataset
from nanochat_jax.errors import NotFound, UsageError, one_line
from nanochat_jax.files import (
    COMPLETE,
    PARTIAL,
    empty_directory,
    finish_directory,
    is_complete,
    locked,
    make_directory,
    parse_json,
    write_file,
)
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.base import Task

logger = logging.getLogger(__name__)

# Commit of each data set, so that benchmarks do not change, and its pattern of a split's files.
PINNED = {
    "allenai/ai2_arc": ("210d026faf9955653af8916fad021475a3f00453", "{subset}/{split}-*.parquet"),
    "cais/mmlu": ("c30699e8356da336a370243923dbaf21066bb9fe", "{subset}/{split}-*.parquet"),
    "openai/gsm8k": ("e53f048856ff4f594e959d75785d2c2d37b678ee", "{subset}/{split}-*.parquet"),
    "openai/openai_humaneval": (
        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        "{subset}/{split}-*.parquet",
    ),
    "HuggingFaceTB/smol-smoltalk": (
        "f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc",
        "data/{split}-*.parquet",
    ),
}
SHUFFLE_SEED = 42
MANIFEST = "manifest.json"
SOURCE = "source.json"  # repository, commit and original names of the downloaded files


def load_split(paths: Paths, repo: str, subset: str, split: str) -> pa.Table:
    """All rows of a split, in the files' order. Downloads it unless it is under `paths.task_data`.

    Raises `NotFound` if it cannot be downloaded, and `UsageError` if the files are damaged or
    empty.
    """
    folder = paths.task_data / repo.replace("/", "--") / subset / split
    if not (folder / MANIFEST).exists() or not is_complete(folder):
        _fetch_split(repo, subset, split, folder)
    name = f"data set {repo} ({subset}, {split}) in {folder}"
    try:
        files = parse_json((folder / MANIFEST).read_bytes())
        table = pa.concat_tables([pq.read_table(folder / file) for file in files]).combine_chunks()
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise UsageError(
            f"{name} is damaged ({one_line(error)}): remove the folder to fetch it again"
        ) from error
    if not table.num_rows:
        raise UsageError(f"{name} has no rows: remove the folder to fetch it again")
    return table


def _fetch_split(repo: str, subset: str, split: str, folder: Path) -> None:
    revision, pattern = PINNED[repo]
    pattern = pattern.format(subset=subset, split=split)
    aside = folder / PARTIAL  # reused after a failure
    with locked(folder):
        finish_directory(folder)
        if (folder / MANIFEST).exists():
            return  # another process has downloaded it
        logger.info("fetching %s (%s, %s)", repo, subset, split)
        make_directory(aside)
        try:
            remote = [
                name
                for name in list_dataset(repo, revision).names
                if glob_pattern(pattern).fullmatch(name)
            ]
            if not remote:
                raise FileNotFoundError(f"it has no files {pattern}")
            names = [f"{i:05d}.parquet" for i in range(len(remote))]
            for name, local in zip(remote, names, strict=True):
                if not (aside / local).exists():
                    fetch(repo, name, aside / local, revision=revision, check=_check_parquet)
        except Exception as error:  # the HTTP client's errors have no common class
            raise NotFound(
                f"data set {repo} ({subset}, {split}) is not in {folder} and could not be fetched: "
                f"{first_line(error)}"
            ) from error
        clean_up(aside)
        write_file(
            aside / SOURCE, json.dumps({"repo": repo, "revision": revision, "files": remote})
        )
        write_file(aside / MANIFEST, json.dumps(names))
        empty_directory(folder)  # it has no manifest
        aside.rename(folder / COMPLETE)
        finish_directory(folder)


def _check_parquet(path: Path) -> None:
    try:
        pq.ParquetFile(path).close()
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} is not a readable parquet file ({first_line(error)})") from error


class HubTask(Task):
    """A task with one conversation per row of a split, in upstream's order: shuffled with seed 42.

    Raises `UsageError` unless each of `columns` exists once and has no missing values.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, paths: Paths, repo: str, subset: str, split: str) -> None:
        self.table = load_split(paths, repo, subset, split)
        for column in self.columns:
            count = self.table.column_names.count(column)
            if count != 1 or self.table[column].null_count:
                fault = f"{count} columns {column!r}" if count != 1 else f"rows without {column!r}"
                raise UsageError(
                    f"data set {repo} ({subset}, {split}) in {paths.task_data} has {fault}: "
                    "remove its folder "
                    "to fetch it again"
                )
        # The order of `datasets.Dataset.shuffle(seed=42)`.
        self.order = np.random.default_rng(SHUFFLE_SEED).permutation(self.table.num_rows)

    def num_examples(self) -> int:
        return self.table.num_rows

    def row(self, index: int) -> dict[str, Any]:
        return self.table.slice(int(self.order[index]), 1).to_pylist()[0]

"""Data sets of the Hugging Face Hub at pinned commits, cached as parquet in the base directory.

    task_data/<owner>--<name>/<subset>/<split>/00000.parquet ... manifest.json

`manifest.json` lists the files in order. A split is complete when it exists. Complete splits are
read without network access.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.data.hub import clean_up, fetch, first_line
from nanochat_jax.data.hub_dataset import glob_pattern, list_dataset
from nanochat_jax.errors import NotFound, UsageError, explaining
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

SHUFFLE_SEED = 42
MANIFEST = "manifest.json"
SOURCE = "source.json"  # repository, commit and original names of the downloaded files


@dataclass(frozen=True)
class HubData:
    """A data set at one commit, so that benchmarks do not change."""

    repo: str
    commit: str
    files: str = "{subset}/{split}-*.parquet"  # pattern of a split's files


def load_split(paths: Paths, data: HubData, subset: str, split: str) -> pa.Table:
    """All rows of a split, in the files' order. Downloads it unless it is under `paths.task_data`.

    Raises `NotFound` if it cannot be downloaded, and `UsageError` if the files are damaged or
    empty.
    """
    folder = paths.task_data / data.repo.replace("/", "--") / subset / split
    name = f"data set {data.repo} ({subset}, {split})"
    if not (folder / MANIFEST).exists() or not is_complete(folder):
        with locked(folder):
            finish_directory(folder)
            if not (folder / MANIFEST).exists():  # no other process has downloaded it
                logger.info("downloading %s", name)
                try:
                    _download_split(data, data.files.format(subset=subset, split=split), folder)
                except Exception as error:  # the HTTP client's errors have no common class
                    raise NotFound(
                        f"{name} is not in {folder} and cannot be downloaded: {first_line(error)}"
                    ) from error
    what, advice = f"{name} in {folder} is damaged", "delete the directory to download it again"
    with explaining(what, advice, OSError, ValueError, TypeError, pa.ArrowException):
        files = parse_json((folder / MANIFEST).read_bytes())
        table = pa.concat_tables([pq.read_table(folder / file) for file in files]).combine_chunks()
        if not table.num_rows:
            raise ValueError("it has no rows")
    return table


def _download_split(data: HubData, pattern: str, folder: Path) -> None:
    aside = make_directory(folder / PARTIAL)  # its files are used again after a failure
    names = list_dataset(data.repo, data.commit).names
    remote = [name for name in names if glob_pattern(pattern).fullmatch(name)]
    if not remote:
        raise FileNotFoundError(f"it has no files {pattern}")
    local_names = [f"{i:05d}.parquet" for i in range(len(remote))]
    for name, local in zip(remote, local_names, strict=True):
        if not (aside / local).exists():
            fetch(data.repo, name, aside / local, revision=data.commit, check=_check_parquet)
    clean_up(aside)
    source = {"repo": data.repo, "revision": data.commit, "files": remote}
    write_file(aside / SOURCE, json.dumps(source))
    write_file(aside / MANIFEST, json.dumps(local_names))
    empty_directory(folder)  # it has no manifest
    aside.rename(folder / COMPLETE)
    finish_directory(folder)


def _check_parquet(path: Path) -> None:
    what = f"{path} is not a readable parquet file"
    with explaining(what, "", pa.ArrowException, OSError):
        pq.ParquetFile(path).close()


class HubTask(Task):
    """A task with one conversation per row of a split, in upstream's order: shuffled with seed 42.

    Raises `UsageError` unless each of `columns` exists once and has no missing values.
    """

    data: HubData
    columns: tuple[str, ...]

    def __init__(self, paths: Paths, subset: str, split: str) -> None:
        self.table = load_split(paths, self.data, subset, split)
        for column in self.columns:
            count = self.table.column_names.count(column)
            if count != 1 or self.table[column].null_count:
                fault = f"{count} columns {column!r}" if count != 1 else f"rows without {column!r}"
                raise UsageError(
                    f"data set {self.data.repo} ({subset}, {split}) in {paths.task_data} has "
                    f"{fault}: delete its directory to download it again"
                )
        # The order of `datasets.Dataset.shuffle(seed=42)`.
        self.order = np.random.default_rng(SHUFFLE_SEED).permutation(self.table.num_rows)

    def num_examples(self) -> int:
        return self.table.num_rows

    def row(self, index: int) -> dict[str, Any]:
        return self.table.slice(int(self.order[index]), 1).to_pylist()[0]

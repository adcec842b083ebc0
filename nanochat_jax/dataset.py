"""Put a pretraining corpus on disk.

    python -m nanochat_jax.dataset -n 8                      8 training shards of ClimbMix and its validation shard
    python -m nanochat_jax.dataset -n 8 --dataset fineweb    of FineWeb-Edu
    python -m nanochat_jax.dataset embedded                  the offline corpus, which needs no network
    python -m nanochat_jax.dataset info                      what is on disk

Downloads go through huggingface_hub, which reads HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. A shard gets its name in the
data directory only when it is whole: the size the Hub announced, a readable footer, a `text` column.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nanochat_jax import cli
from nanochat_jax.cli import NotFound, UsageError, flag
from nanochat_jax.data import embedded
from nanochat_jax.data.hub import clean_up, fetch, first_line
from nanochat_jax.data.shards import TEXT_COLUMN, list_shards, open_shard
from nanochat_jax.paths import DATA_DIRS, Paths

logger = logging.getLogger(__name__)

CHARS_PER_TOKEN = 4.8  # of English web text in a vocabulary of 32,768 to 65,536 (tokens are an estimate here)


@dataclass(frozen=True, kw_only=True)
class HubCorpus:
    """A corpus of shards `shard_00000.parquet` ... on the Hub, the last of which is validation."""

    repo: str
    num_shards: int

    def names(self, num_train: int) -> list[str]:
        """File names of the first `num_train` training shards (-1: all) and the validation shard."""
        available = self.num_shards - 1
        if num_train != -1 and not 1 <= num_train <= available:
            raise UsageError(f"-n {num_train} training shards: expected 1 to {available}, or -1 for all")
        train = range(available if num_train == -1 else num_train)
        return [f"shard_{index:05d}.parquet" for index in (*train, available)]


HUB_CORPORA = {
    "climbmix": HubCorpus(repo="karpathy/climbmix-400b-shuffle", num_shards=6543),
    "fineweb": HubCorpus(repo="karpathy/fineweb-edu-100b-shuffle", num_shards=1823),
}


def is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        _check_shard(path)
    except UsageError as error:
        logger.warning("downloading again: %s", error)
        return False
    return True


def _check_shard(path: Path) -> None:
    open_shard(path).close()


class DownloadDisplay:
    """On a terminal a bar for all shards and one for each that is arriving; elsewhere a line for each that came."""

    def __init__(self, num_shards: int) -> None:
        self._num_shards, self._done, self._bytes, self._began = num_shards, 0, 0, time.monotonic()
        live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=Console(stderr=True), disable=not live,
        )  # fmt: skip
        self._all = self._bars.add_task(f"0/{num_shards} shards", total=None)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "DownloadDisplay":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def arriving(self, name: str, done: int, total: int | None) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total)
        self._bars.update(self._tasks[name], completed=done, total=total)
        self._bars.update(self._all, completed=sum(task.completed for task in self._bars.tasks[1:]))

    def ended(self, name: str, path: Path | None, problem: str = "") -> None:
        self._done += path is not None
        self._bytes += path.stat().st_size if path else 0
        self._bars.update(self._all, description=f"{self._done}/{self._num_shards} shards")
        if name in self._tasks:
            self._bars.update(self._tasks[name], visible=False)
        if problem:
            self._bars.console.print(f"{name} failed: {problem}", markup=False, highlight=False)
        elif self._bars.disable:
            speed = self._bytes / 1e6 / (time.monotonic() - self._began)
            logger.info("[%d/%d] %s (%.1f MB/s in all)", self._done, self._num_shards, name, speed)


def download(
    repo: str, names: Sequence[str], directory: Path, *, num_workers: int = 4, wait_s: float = 1.0
) -> dict[str, str]:
    """Download the shards of `names` that are not in `directory` yet; returns the reason for each that failed.

    The last name is the validation shard. It comes first, and alone: without it, an interrupted download would leave
    a training shard as the last file, which a loader would take for validation.
    """
    directory.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not is_whole(directory / name)]
    if len(missing) < len(names):
        logger.info("%d of %d shards are in %s already", len(names) - len(missing), len(names), directory)
    failed: dict[str, str] = {}
    with DownloadDisplay(len(missing)) as display:

        def get(name: str) -> None:
            try:
                fetch(repo, name, directory / name, check=_check_shard, wait_s=wait_s,
                      progress=lambda done, total: display.arriving(name, done, total))  # fmt: skip
            except Exception as error:  # of the HTTP client or the disk; reported to the caller, by name
                failed[name] = first_line(error)
            display.ended(name, None if name in failed else directory / name, failed.get(name, ""))

        if names[-1] in missing:
            get(names[-1])
            missing.remove(names[-1])
        if names[-1] in failed:
            return failed | {name: "not tried, as there is no validation shard" for name in missing}
        pool = ThreadPoolExecutor(num_workers)
        try:
            for job in [pool.submit(get, name) for name in missing]:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # on Ctrl-C, wait for what is under way, not for the whole list
    if not failed:
        clean_up(directory)
    return failed


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    num_shards: int = flag(8, "training shards to have on disk, -1 for all; the validation shard is added", short="-n")
    num_workers: int = flag(4, "shards to download at once", short="-w")
    dataset: str = flag("climbmix", "which corpus", choices=sorted(HUB_CORPORA))

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"-w {self.num_workers} workers: expected at least 1")


def download_main(config: DownloadConfig) -> int:
    corpus, directory = HUB_CORPORA[config.dataset], Paths.from_env().data(config.dataset)
    names = corpus.names(config.num_shards)
    failed = download(corpus.repo, names, directory, num_workers=config.num_workers)
    print(f"{len(names) - len(failed)} of {len(names)} shards of {config.dataset} are in {directory}")
    for name in sorted(failed):
        print(f"failed: {name}: {failed[name]}", file=sys.stderr)
    return 1 if failed else 0


@dataclass(frozen=True, kw_only=True)
class EmbeddedConfig:
    """No flags."""


def embedded_main(config: EmbeddedConfig) -> int:
    directory = Paths.from_env().data("embedded")
    embedded.build(directory)
    print(f"the embedded corpus is in {directory}")
    return 0


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """No flags."""


@dataclass(frozen=True, kw_only=True)
class SplitSize:
    shards: int
    documents: int
    text_bytes: int

    @property
    def tokens(self) -> int:
        """An estimate."""
        return round(self.text_bytes / CHARS_PER_TOKEN)


def measure(paths: Sequence[Path]) -> SplitSize:
    """Documents and UTF-8 bytes of shards, from their footers alone."""
    documents = text_bytes = 0
    for path in paths:
        with open_shard(path) as file:
            column = file.schema_arrow.names.index(TEXT_COLUMN)
            documents += file.metadata.num_rows
            for group in range(file.num_row_groups):
                text_bytes += file.metadata.row_group(group).column(column).total_uncompressed_size
    text_bytes -= 4 * documents  # each text is stored with its length
    return SplitSize(shards=len(paths), documents=documents, text_bytes=max(0, text_bytes))


def info_main(config: InfoConfig) -> int:
    paths = Paths.from_env()
    paths.find_data()  # says what to do if there is none
    print(f"{'corpus':10} {'split':6} {'shards':>6} {'documents':>12} {'text MB':>10} {'tokens, about':>14}")
    for name in DATA_DIRS:
        try:
            shards = list_shards(paths.data(name))
        except NotFound:
            continue
        for split, members in (("train", shards[:-1]), ("val", shards[-1:])):
            size = measure(members)
            megabytes = size.text_bytes / 1e6
            print(f"{name:10} {split:6} {size.shards:6} {size.documents:12,} {megabytes:10,.1f} {size.tokens:14,}")
    return 0


COMMANDS: dict[str, tuple[Callable[..., int], type, str]] = {
    "download": (download_main, DownloadConfig, "Download a corpus. Also: `embedded` (the offline corpus), `info`."),
    "embedded": (embedded_main, EmbeddedConfig, "Build the offline corpus, which needs no network."),
    "info": (info_main, InfoConfig, "Show which corpora are on disk."),
}


def main() -> NoReturn:
    command = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in COMMANDS else "download"
    action, config_type, description = COMMANDS[command]
    prog = "nanochat_jax.dataset" if command == "download" else f"nanochat_jax.dataset {command}"
    cli.run(action, config_type, prog=prog, description=description)


if __name__ == "__main__":
    main()

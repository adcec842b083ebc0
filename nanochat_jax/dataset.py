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
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from nanochat_jax import cli
from nanochat_jax.cli import NotFound, UsageError, flag
from nanochat_jax.data import embedded
from nanochat_jax.data.shards import TEXT_COLUMN, fsync, list_shards, open_shard
from nanochat_jax.paths import DATA_DIRS, Paths

logger = logging.getLogger(__name__)

ATTEMPTS = 5
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
        open_shard(path).close()
    except UsageError as error:
        logger.warning("downloading again: %s", error)
        return False
    return True


def _fetch(repo: str, name: str, staging: Path) -> Path:
    """Download one shard into `staging`; the Hub's client checks its size."""
    if not constants.HF_HUB_OFFLINE:
        return Path(hf_hub_download(repo, name, repo_type="dataset", local_dir=staging))
    cached = hf_hub_download(repo, name, repo_type="dataset", local_files_only=True)
    return Path(shutil.copyfile(cached, staging / name))


def _fetch_verified(repo: str, name: str, directory: Path, staging: Path, wait_s: float) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        path = staging / name
        try:
            path = _fetch(repo, name, staging)
            open_shard(path).close()
            break
        except Exception as error:  # the HTTP client's errors have no common class; the last one is passed on
            path.unlink(missing_ok=True)
            absent = isinstance(error, (EntryNotFoundError, RepositoryNotFoundError))
            if isinstance(error, LocalEntryNotFoundError):  # also what a failed connection looks like
                absent = constants.HF_HUB_OFFLINE
            if absent or attempt == ATTEMPTS:
                raise
            logger.warning("%s: attempt %d of %d failed (%s)", name, attempt, ATTEMPTS, _first_line(error))
            time.sleep(wait_s * 2**attempt)
    fsync(path)
    os.replace(path, directory / name)


def download(
    repo: str, names: Sequence[str], directory: Path, *, num_workers: int = 4, wait_s: float = 1.0
) -> dict[str, str]:
    """Download the shards of `names` that are not in `directory` yet; returns the reason for each that failed.

    A shard is tried five times, with pauses of 2, 4, 8 and 16 times `wait_s` seconds.
    """
    directory.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not is_whole(directory / name)]
    if len(missing) < len(names):
        logger.info("%d of %d shards are in %s already", len(names) - len(missing), len(names), directory)
    failed: dict[str, str] = {}
    disable_progress_bars()  # they garble each other when several files arrive at once
    with (
        tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as staging,
        ThreadPoolExecutor(num_workers) as pool,
    ):
        jobs = {pool.submit(_fetch_verified, repo, name, directory, Path(staging), wait_s): name for name in missing}
        start = time.monotonic()
        num_bytes = 0
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                name = jobs[job]
                if error := job.exception():
                    failed[name] = _first_line(error)
                    logger.error("[%d/%d] %s failed: %s", done, len(missing), name, failed[name])
                    continue
                num_bytes += (directory / name).stat().st_size
                speed = num_bytes / 1e6 / (time.monotonic() - start)
                logger.info("[%d/%d] %s (%.1f MB/s in all)", done, len(missing), name, speed)
        finally:
            pool.shutdown(cancel_futures=True)  # on Ctrl-C, wait for what is under way, not for the whole list
    fsync(directory)
    return failed


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


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

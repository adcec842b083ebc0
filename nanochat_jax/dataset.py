"""Download or build a pretraining corpus.

    python -m nanochat_jax.dataset -n 8                      8 training shards of ClimbMix
    python -m nanochat_jax.dataset -n 8 --dataset fineweb    8 training shards of FineWeb-Edu
    python -m nanochat_jax.dataset hf --dataset OWNER/NAME   any data set of the Hub
    python -m nanochat_jax.dataset local FILES...            your own text files
    python -m nanochat_jax.dataset embedded                  the offline corpus
    python -m nanochat_jax.dataset info                      corpora on disk

Downloads use huggingface_hub, which reads HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. A shard gets
its final name only when it is complete: size and checksum as announced by the Hub, a readable
footer, a `text` column.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from nanochat_jax import cli
from nanochat_jax.cli import NoFlags, count, flag
from nanochat_jax.data import embedded, hub_dataset
from nanochat_jax.data.convert import describe, read_documents, write_corpus
from nanochat_jax.data.hub import clean_up, fetch, first_line
from nanochat_jax.data.hub_dataset import find_files
from nanochat_jax.data.local_files import expand, sha256, without_repetitions
from nanochat_jax.data.needs import summary
from nanochat_jax.data.shards import open_shard, read_manifest
from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.files import make_directory
from nanochat_jax.metrics import Display
from nanochat_jax.paths import DATA_DIRS, Paths

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HubCorpus:
    """A corpus of shards `shard_00000.parquet` ... on the Hub. The last one is validation."""

    repo: str
    num_shards: int

    def names(self, num_train: int) -> list[str]:
        """File names of the first `num_train` training shards (-1: all) and of validation."""
        available = self.num_shards - 1
        if num_train != -1 and not 1 <= num_train <= available:
            raise UsageError(
                f"-n {num_train} training shards: expected 1 to {available}, or -1 for all"
            )
        train = range(available if num_train == -1 else num_train)
        return [f"shard_{index:05d}.parquet" for index in (*train, available)]


HUB_CORPORA = {
    "climbmix": HubCorpus(repo="karpathy/climbmix-400b-shuffle", num_shards=6543),
    "fineweb": HubCorpus(repo="karpathy/fineweb-edu-100b-shuffle", num_shards=1823),
}


def is_complete_shard(path: Path) -> bool:
    try:
        open_shard(path).close()
    except NotFound:
        return False
    except UsageError as error:
        logger.warning("downloading again: %s", error)
        return False
    return True


class _Downloads:
    """Downloads of shards to a directory, with a display and the errors of those that failed."""

    def __init__(self, repo: str, directory: Path, display: Display):
        self._repo, self._directory, self._display = repo, directory, display
        self.failed: dict[str, str] = {}
        self._num_done = 0
        self._bytes: dict[str, int] = {}
        self._start = time.monotonic()

    def get(self, name: str) -> None:
        target = self._directory / name
        try:
            fetch(
                self._repo,
                name,
                target,
                check=lambda path: open_shard(path).close(),
                progress=lambda done, total: self._show(name, done),
            )
        except Exception as error:  # from the HTTP client or the disk
            self.failed[name] = first_line(error)
            self._display.note(f"{name} failed: {self.failed[name]}")
        else:
            self._num_done += 1
            self._show(name, target.stat().st_size)

    def _show(self, name: str, size: int) -> None:
        self._bytes[name] = size
        megabytes = sum(self._bytes.copy().values()) / 1e6
        rate = megabytes / (time.monotonic() - self._start)
        self._display.update(self._num_done, size=f"{megabytes:,.0f} MB", at=f"{rate:.1f} MB/s")


def download(
    repo: str, names: Sequence[str], directory: Path, *, num_workers: int = 4
) -> dict[str, str]:
    """Download the missing shards of `names`; returns the errors of those that failed, by name.

    The last name is the validation shard, which is downloaded first. Without it, after an
    interrupted download, loaders would take the last training shard for validation.
    """
    make_directory(directory)
    missing = [name for name in names if not is_complete_shard(directory / name)]
    if len(missing) < len(names):
        existing = len(names) - len(missing)
        logger.info("%d of %d shards are already in %s", existing, len(names), directory)
    with contextlib.closing(Display("shards", len(missing))) as display:
        downloads = _Downloads(repo, directory, display)
        if names[-1] in missing:
            missing.remove(names[-1])
            downloads.get(names[-1])
            if downloads.failed:
                skipped = "not downloaded, because the validation shard is missing"
                return downloads.failed | dict.fromkeys(missing, skipped)
        pool = ThreadPoolExecutor(num_workers)
        try:
            for job in [pool.submit(downloads.get, name) for name in missing]:
                job.result()
        finally:
            # on Ctrl-C, wait only for running downloads
            pool.shutdown(cancel_futures=True)
    if not downloads.failed:
        clean_up(directory)
    return downloads.failed


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    num_shards: int = count(
        8,
        "number of training shards, -1: all; the validation shard is added",
        short="-n",
        at_most=10_000,
        also=-1,
    )
    num_workers: int = count(4, "parallel downloads", short="-w", at_most=256)
    dataset: str = flag("climbmix", "which corpus", choices=sorted(HUB_CORPORA))


def download_main(config: DownloadConfig) -> int:
    corpus, directory = HUB_CORPORA[config.dataset], Paths.from_env().data(config.dataset)
    names = corpus.names(config.num_shards)
    failed = download(corpus.repo, names, directory, num_workers=config.num_workers)
    print(
        f"{len(names) - len(failed)} of {len(names)} shards of {config.dataset} are in {directory}"
    )
    for name in sorted(failed):
        print(f"failed: {name}: {failed[name]}", file=sys.stderr)
    return 1 if failed else 0


PRESETS = {"k12": "CrowdMind/K-12Corpus", "opc": "CrowdMind/opc-annealing-corpus-synthetic"}


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Flags of `hf` and `local`."""

    text_field: str = flag(
        "text", "column of parquet and csv files, or key of JSON Lines, that holds the text"
    )
    rows_per_shard: int = count(500_000, "documents per shard")
    val_fraction: float = flag(
        0.005, "share of the documents that goes to the validation shard", at_least=0, at_most=0.99
    )
    cut_chars: int = flag(
        10_000,
        "length in characters of the documents that text files are split into; 0: not split",
        at_least=0,
        at_most=10**9,
    )
    append: bool = flag(False, "add to the existing corpus")


@dataclass(frozen=True, kw_only=True)
class HfConfig(CorpusConfig):
    preset: str | None = flag(
        None,
        f"{', '.join(PRESETS.values())}; overrides --dataset, --subset, --split and --text-field",
        choices=list(PRESETS),
    )
    dataset: str | None = flag(None, "data set OWNER/NAME")
    subset: str | None = flag(None, "subset of the data set; default: its default subset")
    split: str = flag("train", "split of the data set")
    revision: str = flag("main", "commit, branch or tag of the data set")
    limit_rows: int | None = flag(None, "number of rows to read", at_least=2, at_most=cli.LARGEST)

    def __post_init__(self) -> None:
        if not self.name:
            presets = "|".join(PRESETS)
            raise ValueError(f"name a data set: `preset={presets}` or `dataset=OWNER/NAME`")
        if self.preset is None and self.name.count("/") != 1:
            raise ValueError(f"`dataset` {self.dataset!r} is not of the form OWNER/NAME")

    @property
    def name(self) -> str:
        return PRESETS.get(self.preset or "") or self.dataset or ""


def hf_main(config: HfConfig) -> int:
    directory = Paths.from_env().data("custom")
    subset, split, field = config.subset, config.split, config.text_field
    # presets have one subset, the split train and the column text
    if config.preset is not None:
        subset, split, field = None, "train", "text"
    files = find_files(config.name, subset, split, config.revision)
    source = {
        "dataset": files.repo,
        "revision": files.commit,
        "subset": subset,
        "split": split,
        "text_field": field,
        "cut_chars": config.cut_chars,
        "files": len(files.names),
        "limit_rows": config.limit_rows,
    }
    logger.info("%s: %d files", describe(source), len(files.names))
    # on the corpus's disk, which may differ from the base directory's
    staging = directory / ".source"
    documents = hub_dataset.iter_documents(
        files, field, staging, cut_chars=config.cut_chars, limit_rows=config.limit_rows
    )
    return _write(directory, source, config, documents)


@dataclass(frozen=True, kw_only=True)
class LocalConfig(CorpusConfig):
    files: list[str] = cli.arguments(
        "txt, md, jsonl, csv, tsv or parquet files, or directories of them"
    )


def local_main(config: LocalConfig) -> int:
    directory = Paths.from_env().data("custom")
    settings = {"text_field": config.text_field, "cut_chars": config.cut_chars}
    files = {
        path: {"name": str(path.resolve()), "sha256": sha256(path)}
        for path in without_repetitions(expand(config.files))
    }
    source = {"files": list(files.values()), **settings}
    if config.append:
        sources = [entry["source"] for entry in read_manifest(directory).get("sources", ())]
        existing = [
            file
            for other in sources
            if "dataset" not in other and settings.items() <= other.items()
            for file in other["files"]
        ]
        for path in [path for path, file in files.items() if file in existing]:
            logger.warning("%s is skipped: it is already in %s", path, directory)
            del files[path]
        if not files:
            print(f"{describe(source)} is already in {directory}")
            return 0
        source["files"] = list(files.values())
    documents = (
        document
        for path in files
        for document in read_documents(path, config.text_field, config.cut_chars)
    )
    return _write(directory, source, config, documents)


def _write(
    directory: Path, source: dict[str, Any], config: CorpusConfig, documents: Iterable[str | None]
) -> int:
    entry = write_corpus(
        directory,
        source,
        documents,
        rows_per_shard=config.rows_per_shard,
        val_fraction=config.val_fraction,
        append=config.append,
    )
    if entry is None:
        print(f"{describe(source)} is already in {directory}")
    else:
        print(
            f"{entry['documents']:,} documents ({entry['val_documents']:,} for validation) of "
            f"{describe(source)} are in {directory}; {entry['skipped']:,} rows without text were "
            "skipped"
        )
    return 0


def embedded_main(config: NoFlags) -> int:
    directory = Paths.from_env().data("embedded")
    embedded.build(directory)
    print(f"the embedded corpus is in {directory}")
    return 0


def info_main(config: NoFlags) -> int:
    paths = Paths.from_env()
    paths.find_data()  # raises if there is no corpus
    for name in DATA_DIRS:
        if (directory := paths.data(name)).is_dir() and any(directory.glob("*.parquet")):
            print(summary(name, directory))
    return 0


COMMANDS: dict[str, tuple[Callable[..., int], type, str]] = {
    "download": (
        download_main,
        DownloadConfig,
        "Download a corpus. Also: `hf`, `local`, `embedded`, `info`.",
    ),
    "hf": (hf_main, HfConfig, "Make a corpus from a data set of the Hugging Face Hub."),
    "local": (local_main, LocalConfig, "Make a corpus from files on this machine."),
    "embedded": (embedded_main, NoFlags, "Build the offline corpus, which needs no network."),
    "info": (info_main, NoFlags, "Print the corpora on disk and what they are enough for."),
}


def main() -> NoReturn:
    cli.run_commands(COMMANDS, default="download", prog="nanochat_jax.dataset")


if __name__ == "__main__":
    main()

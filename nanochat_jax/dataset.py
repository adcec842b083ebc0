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
import functools
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from nanochat_jax import cli
from nanochat_jax.cli import NoFlags, flag
from nanochat_jax.data import embedded, hub_dataset
from nanochat_jax.data.convert import FORMATS, describe, file_format, read_documents, write_corpus
from nanochat_jax.data.hub import clean_up, fetch, first_line
from nanochat_jax.data.hub_dataset import find_files
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


def is_whole(path: Path) -> bool:
    try:
        open_shard(path).close()
    except NotFound:
        return False
    except UsageError as error:
        logger.warning("downloading again: %s", error)
        return False
    return True


def download(
    repo: str, names: Sequence[str], directory: Path, *, num_workers: int = 4, wait_s: float = 1.0
) -> dict[str, str]:
    """Download the missing shards of `names` to `directory`; returns the failed ones with their
    errors.

    The last name is the validation shard, which is downloaded first. Without it, after an
    interrupted download, loaders would take the last training shard for validation.
    """
    make_directory(directory)
    missing = [name for name in names if not is_whole(directory / name)]
    if len(missing) < len(names):
        logger.info(
            "%d of %d shards are in %s already", len(names) - len(missing), len(names), directory
        )
    failed: dict[str, str] = {}
    ended: list[str] = []
    came: dict[str, int] = {}  # shard -> bytes
    began = time.monotonic()
    with contextlib.closing(Display("shards", len(missing))) as display:

        def show(name: str, done: int, total: int | None) -> None:
            came[name] = done
            megabytes = sum(came.copy().values()) / 1e6
            display.update(
                len(ended),
                size=f"{megabytes:,.0f} MB",
                at=f"{megabytes / (time.monotonic() - began):.1f} MB/s",
            )

        def get(name: str) -> None:
            try:
                fetch(
                    repo,
                    name,
                    directory / name,
                    check=lambda path: open_shard(path).close(),
                    wait_s=wait_s,
                    progress=functools.partial(show, name),
                )
                ended.append(name)
                show(name, (directory / name).stat().st_size, None)
            # from the HTTP client or the disk
            except Exception as error:
                failed[name] = first_line(error)
                display.note(f"{name} failed: {failed[name]}")

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
            # on Ctrl-C, wait only for running downloads
            pool.shutdown(cancel_futures=True)
    if not failed:
        clean_up(directory)
    return failed


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    num_shards: int = flag(
        8,
        "training shards to have on disk, -1 for all; the validation shard is added",
        short="-n",
        at_least=1,
        at_most=10_000,
        also=-1,
    )
    num_workers: int = flag(4, "shards to download at once", short="-w", at_least=1, at_most=256)
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
    """Flags common to `hf` and `local`."""

    text_field: str = flag(
        "text", "column of parquet and csv files, or key of JSON Lines, that holds the text"
    )
    rows_per_shard: int = flag(500_000, "documents of a shard", at_least=1, at_most=10**9)
    val_fraction: float = flag(
        0.005, "share of the documents that goes to the validation shard", at_least=0, at_most=0.99
    )
    cut_chars: int = flag(
        10_000,
        "text files: length in characters of the documents they are cut into; 0: whole",
        at_least=0,
        at_most=10**9,
    )
    append: bool = flag(False, "add to the corpus that is there")


@dataclass(frozen=True, kw_only=True)
class HfConfig(CorpusConfig):
    preset: str | None = flag(
        None,
        f"a known data set, of {', '.join(PRESETS.values())}; goes before --dataset, --subset, "
        "--split, "
        f"--text-field",
        choices=list(PRESETS),
    )
    dataset: str | None = flag(None, "data set OWNER/NAME")
    subset: str | None = flag(
        None, "subset of the data set; default the one its card calls default"
    )
    split: str = flag("train", "split of the data set")
    revision: str = flag("main", "commit, branch or tag of the data set")
    limit_rows: int | None = flag(None, "read only that many rows", at_least=2, at_most=cli.LARGEST)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(
                "name a data set: --preset " + "|".join(PRESETS) + " or --dataset OWNER/NAME"
            )
        if self.preset is None and self.name.count("/") != 1:
            raise ValueError(f"--dataset {self.dataset!r} is not of the form OWNER/NAME")

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
        "txt, md, jsonl, csv, tsv or parquet files, or directories of such"
    )


def local_main(config: LocalConfig) -> int:
    directory = Paths.from_env().data("custom")
    settings = {"text_field": config.text_field, "cut_chars": config.cut_chars}
    files = {
        path: {"name": str(path.resolve()), "sha256": _sha256(path)}
        for path in _once(_expand(config.files))
    }
    source = {"files": list(files.values()), **settings}
    if config.append:
        before = [entry["source"] for entry in read_manifest(directory).get("sources", ())]
        held = [
            file
            for each in before
            if "dataset" not in each and settings.items() <= each.items()
            for file in each["files"]
        ]
        for path in [path for path, file in files.items() if file in held]:
            logger.warning("%s is left out: it is in %s already", path, directory)
            del files[path]
        if not files:
            print(f"{describe(source)} is in {directory} already")
            return 0
        source["files"] = list(files.values())
    documents = (
        document
        for path in files
        for document in read_documents(path, config.text_field, config.cut_chars)
    )
    return _write(directory, source, config, documents)


def _expand(names: Sequence[str]) -> Iterator[Path]:
    """The given files, and files of supported formats in given directories.

    Logs the entries of directories that are skipped.
    """
    for path in map(Path, names):
        if not path.is_dir():
            yield path
            continue
        inside, left_out = list[Path](), list[str]()
        for folder, folders, files in os.walk(path, onerror=_raise):
            linked = [name for name in folders if Path(folder, name).is_symlink()]
            hidden = [name for name in (*folders, *files) if name.startswith(".")]
            folders[:] = sorted({*folders} - {*linked, *hidden})
            known = [
                name
                for name in sorted({*files} - {*hidden})
                if file_format(name) and Path(folder, name).is_file()
            ]
            inside += [Path(folder, name) for name in known]
            left_out += [
                str(Path(folder, name)) for name in sorted({*files, *linked, *hidden} - {*known})
            ]
        if left_out:
            logger.warning(
                "%s: %d entries are left out, as they are hidden, linked directories or files of "
                "another kind: "
                "%s",
                path,
                len(left_out),
                ", ".join(left_out[:5]) + ", ..." * (len(left_out) > 5),
            )
        if not inside:
            raise UsageError(f"{path} holds no file of a known kind ({', '.join(FORMATS)})")
        yield from sorted(inside)


def _raise(error: OSError) -> NoReturn:
    raise error


def _once(paths: Iterable[Path]) -> Iterator[Path]:
    """Each file once, even if given repeatedly or under other names. Logs repetitions."""
    seen: dict[Any, Path] = {}
    for path in paths:
        status = path.stat() if path.exists() else None  # follows links
        if (
            other := seen.setdefault(status and (status.st_dev, status.st_ino), path)
        ) is not path and status:
            logger.warning("%s is the file %s again: read once", path, other)
        else:
            yield path


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error


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
        print(f"{describe(source)} is in {directory} already")
    else:
        print(
            f"{entry['documents']:,} documents ({entry['val_documents']:,} for validation) of "
            f"{describe(source)} "
            f"are in {directory}; {entry['skipped']:,} rows without text were skipped"
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
    "hf": (hf_main, HfConfig, "Make a corpus of any data set of the Hugging Face Hub."),
    "local": (local_main, LocalConfig, "Make a corpus of files on this machine."),
    "embedded": (embedded_main, NoFlags, "Build the offline corpus, which needs no network."),
    "info": (info_main, NoFlags, "Show which corpora are on disk, and what they are enough for."),
}


def main() -> NoReturn:
    cli.run_commands(COMMANDS, default="download", prog="nanochat_jax.dataset")


if __name__ == "__main__":
    main()

"""The files of a split of a Hugging Face data set, and their documents.

A data set card may assign files to subsets and splits. Otherwise paths decide, as in the library
`datasets`: a path contains `train`, `validation`, `test` or a synonym. If no path does, all files
are `train`. Data sets in formats other than `READABLE` are read from the Hub's parquet branch.
"""

import itertools
import logging
import re
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import RevisionNotFoundError

from nanochat_jax.data.convert import REPORT_EVERY_S, file_format, read_documents
from nanochat_jax.data.hub import clean_up, fetch, first_line, quiet_client
from nanochat_jax.errors import NotFound, UsageError

logger = logging.getLogger(__name__)

CONVERTED = "refs/convert/parquet"  # holds <subset>/<split>/0000.parquet ...
# in order of preference, if a split has several formats
READABLE = ("parquet", "jsonl", "csv", "tsv", "text")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Listing:
    """Files of a data set at one commit."""

    repo: str
    commit: str
    names: tuple[str, ...]
    configs: tuple[dict[str, Any], ...] = ()  # from the card: [{"config_name", "data_files": ...}]


def find_files(repo: str, subset: str | None, split: str, revision: str) -> Listing:
    """The files of one split.

    Raises `NotFound` if the data set, subset or split does not exist or cannot be listed.
    """
    name = f"data set {repo}"
    try:
        listing = list_dataset(repo, revision)
        if names := select_files(listing, subset, split):
            return replace(listing, names=tuple(names))
        try:
            converted = list_dataset(repo, CONVERTED)
        except RevisionNotFoundError:
            converted = Listing(repo, "", ())
    except UsageError:
        raise
    except Exception as error:  # the HTTP client's errors have no common class
        offline = "HF_HUB_OFFLINE is set, and it is not in the local cache"
        reason = offline if constants.HF_HUB_OFFLINE else first_line(error)
        raise NotFound(f"cannot list {name}: {reason}") from error
    prefix = f"{subset or 'default'}/{split}/"
    if names := [file for file in converted.names if file.startswith(prefix)]:
        return replace(converted, names=tuple(names))
    splits = {file.rpartition("/")[0] for file in converted.names if file.endswith(".parquet")}
    available = (
        sorted(splits) or [file for file in listing.names if file_format(file) in READABLE][:10]
    )
    raise NotFound(
        f"{name} has no split {split!r}{f' of subset {subset!r}' if subset else ''}; "
        f"it has {', '.join(available) or 'no readable file'}"
    )


def list_dataset(repo: str, revision: str) -> Listing:
    """The files of a data set at a revision. Raises the errors of the Hub's client."""
    quiet_client()
    if constants.HF_HUB_OFFLINE:
        folder = Path(
            snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True)
        )
        names = sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
        )
        return Listing(repo, folder.name, tuple(names))
    info = HfApi().dataset_info(repo, revision=revision)
    card = info.card_data.to_dict() if info.card_data else {}
    names = sorted(sibling.rfilename for sibling in info.siblings or ())
    return Listing(repo, info.sha or revision, tuple(names), tuple(card.get("configs") or ()))


def select_files(listing: Listing, subset: str | None, split: str) -> list[str]:
    """The readable files of a split, in order, all of one format; empty if there are none."""
    config = _choose_config(listing.configs, subset)
    files = [name for name in listing.names if file_format(name) in READABLE]
    files = [name for name in files if not _is_documentation(name)]
    if config is not None and "data_files" in config:
        patterns = [glob_pattern(pattern) for pattern in _patterns(config["data_files"], split)]
        files = [name for name in files if any(p.fullmatch(name) for p in patterns)]
    else:
        folder = config.get("data_dir") if config is not None else subset
        if folder:
            files = [name for name in files if name.startswith(folder.strip("/") + "/")]
        files = _by_split_words(files, split)
    for format in READABLE:
        if chosen := [name for name in files if file_format(name) == format]:
            if len(chosen) < len(files):
                logger.info(
                    "reading %d %s files; %d files of the split have other formats",
                    len(chosen),
                    format,
                    len(files) - len(chosen),
                )
            return chosen
    return []


def _choose_config(configs: Sequence[dict[str, Any]], subset: str | None) -> dict[str, Any] | None:
    if not configs:
        return None
    names = ", ".join(str(config.get("config_name")) for config in configs)
    if subset is None:
        default = [c for c in configs if c.get("default") or c.get("config_name") == "default"]
        if len(configs) > 1 and not default:
            raise UsageError(f"the data set has several subsets: set `subset` to one of {names}")
        return (default or list(configs))[0]
    for config in configs:
        if config.get("config_name") == subset:
            return config
    raise NotFound(f"the data set has no subset {subset!r}; it has {names}")


def _patterns(data_files: Any, split: str) -> list[str]:
    """Patterns of a split, from a string or list of strings (train) or a list of {split, path}."""
    patterns: list[str] = []
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        if not isinstance(entry, dict):
            entry = {"split": "train", "path": entry}
        if entry.get("split") == split:
            path = entry.get("path", [])
            patterns += path if isinstance(path, list) else [path]
    return patterns


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """Regular expression of a glob: `*` and `?` do not match a slash, `**` does."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))


def _by_split_words(files: list[str], split: str) -> list[str]:
    def has(name: str, words: Sequence[str]) -> bool:
        return any(
            re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", name.lower()) for word in words
        )

    if any(has(name, words) for name in files for words in SPLIT_WORDS.values()):
        return [name for name in files if has(name, SPLIT_WORDS.get(split, (split.lower(),)))]
    return files if split == "train" else [name for name in files if has(name, (split.lower(),))]


def _is_documentation(name: str) -> bool:
    stem = name.rpartition("/")[2].lower()
    return stem.startswith(("readme", "license", "licence", "requirements", ".")) or stem.endswith(
        (".md", "_info.json", "_infos.json", "state.json", "config.json")
    )


def iter_documents(
    files: Listing, field: str, folder: Path, *, cut_chars: int, limit_rows: int | None
) -> Iterator[str | None]:
    """The documents of all files, or of their first `limit_rows` rows.

    Each file is downloaded to `folder` and deleted after use. Without a limit, the next file is
    downloaded while the current one is read.
    """
    paths = _downloaded(files, folder, ahead=limit_rows is None)
    documents = (text for path in paths for text in read_documents(path, field, cut_chars))
    try:
        yield from itertools.islice(documents, limit_rows)
    finally:
        documents.close()
        paths.close()
        # keep only partial downloads
        for file in folder.glob("?????-*"):
            file.unlink()
        clean_up(folder)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _downloaded(files: Listing, folder: Path, *, ahead: bool) -> Generator[Path, None, None]:
    """The files one by one in `folder`; deletes each when the next is requested."""
    count, following = len(files.names), None
    with ThreadPoolExecutor(1) as pool:
        for index, name in enumerate(files.names):
            path = (following or pool.submit(_download, files, index, folder)).result()
            more = ahead and index + 1 < count
            following = pool.submit(_download, files, index + 1, folder) if more else None
            megabytes = path.stat().st_size / 1e6
            logger.info("[%d/%d] %s (%.1f MB)", index + 1, count, name, megabytes)
            yield path
            path.unlink()


def _download(files: Listing, index: int, folder: Path) -> Path:
    name, last_report = files.names[index], time.monotonic()

    def progress(done: int, total: int | None) -> None:
        nonlocal last_report
        if time.monotonic() - last_report > REPORT_EVERY_S:
            last_report = time.monotonic()
            size = "?" if total is None else f"{total / 1e6:.0f}"
            logger.info("%s: %.0f of %s MB", name, done / 1e6, size)

    target = folder / f"{index:05d}-{name.replace('/', '-')}"
    try:
        fetch(files.repo, name, target, revision=files.commit, progress=progress)
    except Exception as error:  # the HTTP client's errors have no common class
        raise NotFound(f"cannot download {name} of {files.repo}: {first_line(error)}") from error
    return target

"""The files of a split of a Hugging Face data set, and their documents.

A data set card may assign files to subsets and splits. Otherwise paths decide, as in the library
`datasets`: a path contains `train`, `validation`, `test` or a synonym. If no path does, all files
are `train`. Data sets in other formats than `READABLE` are read from the Hub's parquet branch.
"""

import logging
import re
import time
from collections.abc import Iterator, Sequence
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
        raise NotFound(f"{name} is not to be had: {reason}") from error
    if names := [
        file for file in converted.names if file.startswith(f"{subset or 'default'}/{split}/")
    ]:
        return replace(converted, names=tuple(names))
    known = sorted(
        {file.rpartition("/")[0] for file in converted.names if file.endswith(".parquet")}
    )
    known = known or sorted(file for file in listing.names if file_format(file) in READABLE)[:10]
    raise NotFound(
        f"{name} has no split {split!r}{f' of subset {subset!r}' if subset else ''}; "
        f"it has {', '.join(known) or 'no file that can be read'}"
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
    files = [
        name
        for name in listing.names
        if file_format(name) in READABLE and not _is_documentation(name)
    ]
    if config is not None and "data_files" in config:
        patterns = _patterns(config["data_files"], split)
        files = [
            name
            for name in files
            if any(glob_pattern(pattern).fullmatch(name) for pattern in patterns)
        ]
    else:
        folder = config.get("data_dir") if config is not None else subset
        if folder:
            files = [name for name in files if name.startswith(folder.strip("/") + "/")]
        files = _by_split_words(files, split)
    for kind in READABLE:
        if chosen := [name for name in files if file_format(name) == kind]:
            if len(chosen) < len(files):
                logger.info(
                    "reading the %d %s files of %d that hold this split",
                    len(chosen),
                    kind,
                    len(files),
                )
            return chosen
    return []


def _choose_config(configs: Sequence[dict[str, Any]], subset: str | None) -> dict[str, Any] | None:
    if not configs:
        return None
    names = ", ".join(str(config.get("config_name")) for config in configs)
    if subset is None:
        found = [c for c in configs if c.get("default") or c.get("config_name") == "default"]
        if len(configs) > 1 and not found:
            raise UsageError(
                f"the data set has several subsets: choose one with --subset, of {names}"
            )
        return (found or list(configs))[0]
    found = [config for config in configs if config.get("config_name") == subset]
    if not found:
        raise NotFound(f"the data set has no subset {subset!r}: there are {names}")
    return found[0]


def _patterns(data_files: Any, split: str) -> list[str]:
    """Patterns of a split, from a string or list of strings (train) or a list of {split, path}."""
    found: list[str] = []
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        of_split, path = (
            (entry.get("split"), entry.get("path", []))
            if isinstance(entry, dict)
            else ("train", entry)
        )
        if of_split == split:
            found += path if isinstance(path, list) else [path]
    return found


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
    files: Listing,
    field: str,
    folder: Path,
    *,
    cut_chars: int,
    limit_rows: int | None,
    wait_s: float = 1.0,
) -> Iterator[str | None]:
    """The documents of all files, or of their first `limit_rows` rows.

    Each file is downloaded to `folder` and deleted after use. Without a limit, the next file is
    downloaded while the current one is read.
    """

    def get(index: int) -> Path:
        name, last = files.names[index], time.monotonic()

        def progress(done: int, total: int | None) -> None:
            nonlocal last
            if time.monotonic() - last > REPORT_EVERY_S:
                last = time.monotonic()
                logger.info(
                    "%s: %.0f of %s MB",
                    name,
                    done / 1e6,
                    "?" if total is None else f"{total / 1e6:.0f}",
                )

        target = folder / f"{index:05d}-{name.replace('/', '-')}"
        try:
            fetch(files.repo, name, target, revision=files.commit, wait_s=wait_s, progress=progress)
        except Exception as error:  # the HTTP client's errors have no common class
            raise NotFound(
                f"{name} of {files.repo} could not be fetched: {first_line(error)}"
            ) from error
        return target

    left, arriving = limit_rows, None
    try:
        with ThreadPoolExecutor(1) as pool:
            for index, name in enumerate(files.names):
                path = (arriving or pool.submit(get, index)).result()
                # with a limit, the next file may not be needed
                ahead = limit_rows is None and index + 1 < len(files.names)
                arriving = pool.submit(get, index + 1) if ahead else None
                logger.info(
                    "[%d/%d] %s (%.1f MB)",
                    index + 1,
                    len(files.names),
                    name,
                    path.stat().st_size / 1e6,
                )
                for document in read_documents(path, field, cut_chars):
                    if left == 0:
                        return
                    left = None if left is None else left - 1
                    yield document
                path.unlink()
    finally:  # keep only partial downloads
        for file in folder.glob("?????-*"):
            file.unlink()
        clean_up(folder)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

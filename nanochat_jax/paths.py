"""The base directory, which all stages read from and write to.

    tokenizer/                                  the trained vocabulary
    base_data[_custom|_climbmix|_embedded]/     parquet shards; the last by name is validation
    base_checkpoints/<tag>/                     also mid_, chatsft_ and chatrl_checkpoints;
                                                metrics.jsonl is next to the steps
    task_data/  eval_bundle/  report/

With `NANOCHAT_CHECKPOINT_DIR=gs://bucket/...` the checkpoint directories are in that bucket, for
machines without a shared disk; all else stays under each machine's base directory.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.cli import user_path
from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.files import create_directory
from nanochat_jax.storage import COMMITTED, Directory, delete, is_remote, move, open_bucket

CHECKPOINT_DIRS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
# Directory of each corpus, in order of preference. `custom` exists only if the user made it, so it
# comes first.
DATA_DIRS = {
    "custom": "base_data_custom",
    "climbmix": "base_data_climbmix",
    "fineweb": "base_data",
    "embedded": "base_data_embedded",
}
TRAINING_SCRIPTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}


@dataclass(frozen=True)
class Paths:
    """The layout under one base directory."""

    base: Path
    bucket: str = ""  # gs://...: holds the checkpoints instead of the base directory

    @classmethod
    def from_env(cls) -> "Paths":
        """`Paths` from `$NANOCHAT_BASE_DIR` and `$NANOCHAT_CHECKPOINT_DIR`, for entry points.

        The base directory, by default `~/.cache/nanochat`, is created if missing.
        """
        given = os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"
        if "://" in given:  # would be a local directory of that name
            raise UsageError(
                f"NANOCHAT_BASE_DIR={given}: the base directory must be a path; only checkpoints "
                "can be in a bucket: NANOCHAT_CHECKPOINT_DIR=gs://..."
            )
        remote = os.environ.get("NANOCHAT_CHECKPOINT_DIR", "").rstrip("/")
        if remote and not re.match("gs://[^/]", remote):
            raise UsageError(
                f"NANOCHAT_CHECKPOINT_DIR={remote}: expected a bucket, gs://bucket/...; on a disk, "
                "checkpoints are under NANOCHAT_BASE_DIR"
            )
        base = user_path(given).absolute()
        create_directory(base)
        return cls(base, remote)

    @property
    def tokenizer(self) -> Path:
        return self.base / "tokenizer"

    @property
    def task_data(self) -> Path:
        return self.base / "task_data"

    @property
    def eval_bundle(self) -> Path:
        return self.base / "eval_bundle"

    @property
    def report(self) -> Path:
        return self.base / "report"

    @property
    def compile_cache(self) -> Path:
        return self.base / "compile_cache"

    def data(self, name: str) -> Path:
        """Directory of the parquet shards of a name in `DATA_DIRS`."""
        return self.base / DATA_DIRS[name]

    def find_data(self) -> str:
        """Name of the corpus on disk: the first of `DATA_DIRS` with shards."""
        for name in DATA_DIRS:
            if any(self.data(name).glob("*.parquet")):
                return name
        raise NotFound(
            f"no parquet shards under {self.base}: run `python -m nanochat_jax.dataset -n 8` "
            "(or `python -m nanochat_jax.dataset embedded`, which needs no network) first"
        )

    def checkpoints(self, source: str) -> Directory:
        """Directory of a stage's tags, which hold the steps."""
        return (open_bucket(self.bucket) if self.bucket else self.base) / CHECKPOINT_DIRS[source]

    def logs(self, source: str) -> Path:
        """The same on this machine's disk, for metrics and other logs."""
        return self.base / CHECKPOINT_DIRS[source]

    def tags(self, source: str) -> list[str]:
        """The tags of a stage that have a step."""
        root = self.checkpoints(source)
        tags = root.iterdir() if root.is_dir() else ()
        return sorted(path.name for path in tags if path.name[0] != "." and saved_steps(path))

    def find_tag(self, source: str) -> str:
        """The default tag of those with a step: the largest `d<depth>`, else the newest."""
        root = self.checkpoints(source)
        tags = [root / name for name in self.tags(source)]
        if not tags:
            others = root.iterdir() if root.is_dir() else ()
            foreign = [path for path in others if foreign_checkpoints(path)]
            raise NotFound(f"no {source} checkpoint in {root}: {how_to_get(source, *foreign[:1])}")
        sized = [
            (int(match[1]), match[0] == path.name, path.name)  # d20 before d20-test
            for path in tags
            if (match := re.match(r"d(\d+)", path.name))
        ]
        if sized:
            return max(sized)[-1]
        if self.bucket and len(tags) > 1:  # buckets record no times of directories
            raise UsageError(
                f"{root} holds {', '.join(path.name for path in tags)}: choose one with `model_tag`"
            )
        if len(tags) == 1:
            return tags[0].name
        return max(tags, key=lambda path: path.stat().st_mtime).name


def base_tokenizer(tag: Path) -> Path:
    """The tokenizer directory of the base directory that contains a tag's directory.

    If the tag is a link to another disk, the link's own path counts, not its target.
    """
    named, real = (
        Path(path(tag)).parent.parent / "tokenizer" for path in (os.path.abspath, os.path.realpath)
    )
    return named if named.is_dir() else real


def saved_steps(directory: Directory) -> list[int]:
    """Complete steps of a tag, in order."""
    if not directory.is_dir():
        return []
    complete = COMMITTED if is_remote(directory) else "params"
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if path.name.isdigit() and (path / complete).exists()
    )


def delete_steps(directory: Directory) -> None:
    """Delete the complete steps of a tag, and nothing else."""
    for step in saved_steps(directory):
        if is_remote(directory):
            delete(directory / str(step))
        else:  # renamed first: a half-deleted directory must not look like a step
            (directory / str(step)).rename(aside := directory / f".deleted-{step}")
            shutil.rmtree(aside)


def how_to_get(source: str, foreign: Directory | None = None) -> str:
    """How to get a model of a stage; `foreign`: a directory of `foreign_checkpoints`."""
    if foreign is None:
        return f"run `python -m scripts.{TRAINING_SCRIPTS[source]}` first"
    command = f"python -m scripts.import_weights --from {foreign}"
    return f"`{command}` imports nanochat's PyTorch checkpoints"


def foreign_checkpoints(directory: Directory) -> list[str]:
    """Checkpoints of nanochat's PyTorch code, whose default base directory is the same."""
    if is_remote(directory):
        return []
    return sorted(path.name for path in directory.glob("*_*.pt"))


def refuse_foreign(directory: Directory) -> None:
    """Raise `UsageError` if a tag's directory holds checkpoints of nanochat's PyTorch code."""
    if foreign := foreign_checkpoints(directory):
        raise UsageError(
            f"{directory} holds checkpoints of nanochat's PyTorch code, such as {foreign[0]}: "
            "set another `model_tag`, or another base directory with NANOCHAT_BASE_DIR"
        )


def rename_directory(directory: Directory, target: Directory) -> None:
    """Rename a directory. An interruption loses and duplicates nothing."""
    if is_remote(directory):
        move(directory, target)
    else:
        directory.rename(target)

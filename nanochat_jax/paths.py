"""The base directory: where every stage reads the one before it and writes its own.

    tokenizer/                        the trained vocabulary
    base_data[_custom|_climbmix|_embedded]/   parquet shards; the last one by name is validation
    base_checkpoints/<tag>/           likewise mid_, chatsft_ and chatrl_checkpoints; metrics.jsonl lies beside the steps
    task_data/  eval_bundle/  report/
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.cli import NotFound, UsageError

CHECKPOINT_DIRS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
# Where each corpus lies, in the order of preference; `custom` is there only if somebody made it, so it comes first.
DATA_DIRS = {"custom": "base_data_custom", "climbmix": "base_data_climbmix", "fineweb": "base_data",
             "embedded": "base_data_embedded"}
HOW_TO_MAKE = {"base": "scripts.base_train", "mid": "scripts.mid_train", "sft": "scripts.chat_sft", "rl": "scripts.chat_rl"}


@dataclass(frozen=True)
class Paths:
    """The layout under one base directory."""

    base: Path

    @classmethod
    def from_env(cls) -> "Paths":
        """`$NANOCHAT_BASE_DIR`, else `~/.cache/nanochat`; created on demand. For entry points only."""
        given = os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"
        if "://" in given:  # as a path it would be a directory of that odd name, here
            raise UsageError(f"NANOCHAT_BASE_DIR={given}: the base directory must be a path; mount the bucket (gcsfuse) and "
                             "give the place")
        base = Path(given).expanduser().absolute()
        base.mkdir(parents=True, exist_ok=True)
        return cls(base)

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
        """Directory of the parquet shards of one of `DATA_DIRS`."""
        return self.base / DATA_DIRS[name]

    def find_data(self) -> str:
        """Name of the corpus that is on disk (the first of `DATA_DIRS` that has shards)."""
        for name in DATA_DIRS:
            if any(self.data(name).glob("*.parquet")):
                return name
        raise NotFound(f"no parquet shards under {self.base}: run `python -m nanochat_jax.dataset -n 8` "
                       "(or `python -m nanochat_jax.dataset embedded`, which needs no network) first")

    def checkpoints(self, source: str) -> Path:
        return self.base / CHECKPOINT_DIRS[source]

    def find_tag(self, source: str) -> str:
        """The tag a user means who names none: the largest `d<depth>`, else the newest directory."""
        root = self.checkpoints(source)
        tags = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."] if root.is_dir() else []
        if not tags:
            raise NotFound(f"no {source} checkpoint in {root}: run `python -m {HOW_TO_MAKE[source]}` first")
        sized = [(int(match[1]), path.name) for path in tags if (match := re.match(r"d(\d+)", path.name))]
        if sized:
            return max(sized)[1]
        return max(tags, key=lambda path: path.stat().st_mtime).name


def remove_directory(directory: Path) -> None:
    """Delete a directory so that, wherever this is interrupted, no half of it is left under its name."""
    for old in directory.parent.glob(f".deleted-{directory.name}-*"):
        shutil.rmtree(old)
    if directory.exists():
        shutil.rmtree(directory.rename(directory.with_name(f".deleted-{directory.name}-{os.getpid()}")))

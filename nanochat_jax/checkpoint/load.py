"""Loading a stage's model, its tokenizer and its optimizer state."""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nanochat_jax.checkpoint.integrity import (
    CHECKSUMS,
    Damaged,
    newest_readable,
    read_state,
    read_trees,
)
from nanochat_jax.errors import NotFound, UsageError, explaining
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.sharding import abstract_tree, make_mesh, param_shardings
from nanochat_jax.model.weights import Params, abstract_params
from nanochat_jax.paths import Paths, base_tokenizer, foreign_checkpoints, how_to_get, saved_steps
from nanochat_jax.storage import Directory, copy_files, is_remote
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A trained model, ready for inference or for the next stage."""

    config: GPTConfig
    params: Params
    own_tokenizer: Tokenizer | None  # None if imported without one
    meta: dict[str, Any]
    directory: Directory
    step: int
    source: str

    @property
    def tag(self) -> str:
        return self.directory.name

    @property
    def tokenizer(self) -> Tokenizer:
        if self.own_tokenizer is None:
            raise UsageError(
                f"{self.directory} was imported without a tokenizer: import it again with its "
                "tokenizer"
            )
        return self.own_tokenizer


def load_model(
    paths: Paths,
    source: str,
    *,
    tag: str | None = None,
    step: int | None = None,
    mesh: Mesh | None = None,
    fsdp: bool = False,
) -> Loaded:
    """The parameters of a stage ("base", "mid", "sft" or "rl"), from `find_model`'s directory."""
    directory = find_model(paths, source, tag)
    return load_directory(directory, source=source, step=step, mesh=mesh, fsdp=fsdp)


def find_model(paths: Paths, source: str, tag: str | None) -> Directory:
    """The directory of a stage's tag. Without a tag: the largest `d<depth>`, else the newest.

    Raises `NotFound` if it has no step.
    """
    directory = paths.checkpoints(source) / (tag or paths.find_tag(source))
    if not saved_steps(directory):
        foreign = directory if foreign_checkpoints(directory) else None
        others = "" if foreign else ", ".join(paths.tags(source))
        advice = f"there are {others}" if others else how_to_get(source, foreign)
        raise NotFound(f"no {source} checkpoint in {directory}: {advice}")
    return directory


def load_directory(
    directory: Directory,
    *,
    source: str = "base",
    step: int | None = None,
    mesh: Mesh | None = None,
    fsdp: bool = False,
) -> Loaded:
    """The model in a tag's directory, float32, sharded; without a step, the greatest readable one.

    Its tokenizer is in `tokenizer/` under it (an imported model's own) or in the base directory.
    Raises `NotFound` if the step is missing, `UsageError` if the tokenizer is not the checkpoint's.
    """
    steps = saved_steps(directory)
    if not steps or step is not None and step not in steps:
        saved = ", ".join(map(str, steps)) or "none"
        raise NotFound(
            f"no step{'' if step is None else f' {step}'} in {directory}; saved steps: {saved}"
        )
    mesh = make_mesh("1x1") if mesh is None else mesh

    def load(candidate: int) -> Loaded:
        log.info("loading %s step %d", directory, candidate)
        meta = read_state(directory, candidate)
        config = GPTConfig.from_dict(meta["model_config"])
        tokenizer = _load_tokenizer(directory, meta["tokenizer"])
        abstract = abstract_tree(abstract_params(config), param_shardings(config, mesh, fsdp=fsdp))
        trees = read_trees(directory, candidate, meta.get(CHECKSUMS, {}), params=abstract)
        return Loaded(config, trees["params"], tokenizer, meta, directory, candidate, source)

    return newest_readable(directory, steps if step is None else [step], load)


def load_optimizer(loaded: Loaded, abstract: Any) -> Any:
    """The optimizer state saved with a loaded model; `abstract`: its shapes and shardings."""
    path = loaded.directory / str(loaded.step)
    if not (path / "optimizer").is_dir():
        raise NotFound(f"{path} was saved without an optimizer: set `load_optimizer=0`")
    what = f"the optimizer state in {path} cannot be read"
    checksums = loaded.meta.get(CHECKSUMS, {})
    with explaining(what, "set `load_optimizer=0`", Damaged):
        trees = read_trees(loaded.directory, loaded.step, checksums, optimizer=abstract)
    return trees["optimizer"]


def _load_tokenizer(directory: Directory, fingerprint: str | None) -> Tokenizer | None:
    """The tokenizer that a checkpoint was trained with; None if it was imported without one."""
    if fingerprint is None:
        return None
    if is_remote(directory):
        source = _remote_tokenizer(directory, fingerprint)
        tokenizer = _download_tokenizer(source, directory)
    else:
        own, shared = directory / "tokenizer", base_tokenizer(directory)
        # the tag's own may belong to deleted steps
        for source in [path for path in (own, shared) if path.is_dir()] or [shared]:
            tokenizer = Tokenizer.load(source)
            if tokenizer.fingerprint() == fingerprint:
                break
    if tokenizer.fingerprint() != fingerprint:
        raise UsageError(
            f"the tokenizer in {source} is not the one {directory} was trained with: "
            "restore that tokenizer, or train the model again"
        )
    return tokenizer


def _download_tokenizer(source: Directory, directory: Directory) -> Tokenizer:
    with tempfile.TemporaryDirectory() as scratch:
        if source.is_dir():
            copy_files(source, Path(scratch))
        try:
            return Tokenizer.load(Path(scratch))
        except NotFound as error:
            raise NotFound(
                f"the tokenizer of {directory} is missing in {source}: copy it there"
            ) from error


def _remote_tokenizer(directory: Directory, fingerprint: str) -> Directory:
    """A bucket's tokenizer directory, by fingerprint.

    Under the tag, Orbax would delete it as an incomplete step.
    """
    return directory.parent.parent / "tokenizers" / fingerprint


def keep_tokenizer(
    tokenizer: Tokenizer, directory: Directory, origin: Loaded | None = None
) -> None:
    """Save the tokenizer for those who load the run's steps.

    Needed in a bucket, and if the model that the run continues has its own.
    """
    if jax.process_index() != 0:
        return
    if is_remote(directory):
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save(Path(scratch))
            copy_files(Path(scratch), _remote_tokenizer(directory, tokenizer.fingerprint()))
    elif origin is not None and (origin.directory / "tokenizer").is_dir():
        tokenizer.save(directory / "tokenizer")

"""Between foreign checkpoints and the base directory's: saving an import, metadata of an export."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from nanochat_jax.checkpoint import Checkpoints, Loaded, claim_directory, keep_tokenizer, lock_tag
from nanochat_jax.errors import NotFound
from nanochat_jax.files import make_directory
from nanochat_jax.interop.torch_checkpoint import Imported, check_vocabulary
from nanochat_jax.metrics import read_metrics
from nanochat_jax.paths import Paths
from nanochat_jax.storage import Directory, is_remote
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.optim import CLASSIC_RATES, OptimizerConfig

log = logging.getLogger(__name__)

RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")


def save_imported(
    imported: Imported, paths: Paths, directory: Directory, *, origin: str, fresh: bool
) -> None:
    """Save a foreign checkpoint as a step of the tag `directory`, with its tokenizer."""
    tokenizer, tokenizer_dir = _choose_tokenizer(imported, paths, directory)
    if tokenizer_dir == paths.tokenizer:
        make_directory(tokenizer_dir)
    with lock_tag(directory):
        # nothing is refused after this point: `fresh` may delete
        claim_directory(directory, resume=None, fresh=fresh)
        if tokenizer is not None:
            keep_tokenizer(tokenizer, directory)
            if tokenizer_dir is not None and not is_remote(directory):
                tokenizer.save(tokenizer_dir)
        with Checkpoints(directory) as checkpoints:
            state = _state(imported, tokenizer, origin)
            checkpoints.save(imported.step, imported.params, None, state)
            checkpoints.wait()


def _choose_tokenizer(
    imported: Imported, paths: Paths, directory: Directory
) -> tuple[Tokenizer | None, Path | None]:
    """(the model's tokenizer, the directory to save it in), each None if there is none.

    The base directory's tokenizer is never replaced: a model with a different one keeps its own in
    the tag's directory.
    """
    try:
        shared = Tokenizer.load(paths.tokenizer)
    except NotFound:
        shared = None
    own = imported.tokenizer
    if own is None and shared is None:
        log.warning(
            "found no tokenizer: only the weights are imported; the model takes and returns token "
            "ids only"
        )
        return None, None
    if own is None:
        check_vocabulary(imported.config, shared, directory)
        log.info("assuming that the model's tokenizer is the one in %s", paths.tokenizer)
        return shared, None
    if shared is None:
        return own, paths.tokenizer
    if shared.fingerprint() == own.fingerprint():
        return own, None
    target = directory / "tokenizer"
    log.info(
        "the tokenizer in %s is different: the model's is saved to %s", paths.tokenizer, target
    )
    return own, target


def _state(imported: Imported, tokenizer: Tokenizer | None, origin: str) -> dict[str, Any]:
    """The JSON state that training would have saved, as far as upstream's metadata has it."""
    modern = imported.config.arch == "modern"
    given = imported.meta.get("user_config") or {}
    rates = dataclasses.asdict(OptimizerConfig(**({} if modern else CLASSIC_RATES)))
    rates |= {name: float(given[name]) for name in RATES if given.get(name) is not None}
    total = imported.meta.get("total_batch_size") or given.get("total_batch_size")
    return {
        "step": imported.step,
        "model_config": dataclasses.asdict(imported.config),
        "tokenizer": tokenizer.fingerprint() if tokenizer else None,
        "byte_rule": imported.byte_rule,
        "data": None,
        "packing": "bestfit" if modern else "stream",
        "rates": rates,
        "lr_scale": 1.0,
        "total_batch_size": total if isinstance(total, int) and total > 0 else 524288,
        "imported": {"from": origin, "meta": imported.meta},
    }


def upstream_meta(loaded: Loaded) -> dict[str, Any]:
    """Upstream's metadata: the original of an imported model, else what upstream's loaders need."""
    meta = loaded.meta
    if "imported" in meta:
        original = meta["imported"]["meta"].items()
        return {name: value for name, value in original if name not in ("step", "model_config")}
    return {
        "val_bpb": _validation_bpb(loaded),
        "user_config": meta.get("config", {}),
        "max_seq_len": loaded.config.sequence_len,
        "total_batch_size": meta.get("total_batch_size"),
    }


def _validation_bpb(loaded: Loaded) -> float | None:
    """Bits per byte of this step's evaluation, if there was one."""
    path = loaded.directory / "metrics.jsonl"
    rows = read_metrics(path) if path.is_file() else []
    values = [row["val_bpb"] for row in rows if row["step"] == loaded.step and "val_bpb" in row]
    return values[-1] if values else None

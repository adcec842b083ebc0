"""Import a trained model: nanochat's PyTorch checkpoint or a Hugging Face directory.

python -m scripts.import_weights --from ~/nanochat-d32 --source sft --model-tag d32
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax import cli
from nanochat_jax.checkpoint import Checkpoints, claim_directory, keep_tokenizer, lock_tag
from nanochat_jax.cli import LARGEST, directory_name, flag, user_path
from nanochat_jax.devices import DeviceFlags, start
from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.files import make_directory
from nanochat_jax.interop.torch_checkpoint import Imported, check_vocabulary
from nanochat_jax.model.size import num_params
from nanochat_jax.paths import CHECKPOINT_DIRS, Paths
from nanochat_jax.pretrained import read_foreign
from nanochat_jax.storage import is_remote
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.optim import CLASSIC_RATES, OptimizerConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImportConfig(DeviceFlags):
    from_dir: str | None = flag(
        None,
        "directory with model_<step>.pt and meta_<step>.json, or with config.json and .safetensors",
        short="--from",
    )
    source: str = flag("base", "stage the model is of", choices=[*CHECKPOINT_DIRS])
    model_tag: str | None = flag(
        None,
        "name of the checkpoint directory to make; default d<depth>",
        short="-g",
        check=directory_name,
    )
    step: int | None = flag(
        None, "step to import; default the greatest", short="-s", at_least=0, at_most=LARGEST
    )
    tokenizer: str | None = flag(
        None, "directory of its tokenizer; default beside the model, or in its base directory"
    )
    rotary_dtype: str = flag(
        "auto",
        "rotary tables of a classic model; auto: bfloat16 as nanochat's own code, float32 as "
        "transformers' (hf)",
        choices=["auto", "float32", "bfloat16"],
    )
    fresh: bool = flag(False, "delete the checkpoints that this tag already has")

    def __post_init__(self) -> None:
        if self.from_dir is None:
            raise ValueError("--from is missing: give the directory of the checkpoint")


def choose_tokenizer(
    found: Tokenizer | None, paths: Paths, directory: Path, imported: Imported
) -> tuple[Tokenizer | None, Path | None]:
    """(the model's tokenizer, the directory to save it in), each None if there is none.

    The base directory's tokenizer is never replaced: a model with another one keeps it under its
    tag.
    """
    try:
        shared = Tokenizer.load(paths.tokenizer)
    except NotFound:
        shared = None
    if found is None:
        if shared is None:
            log.warning(
                "no tokenizer was found: the weights are imported alone, and only token ids will "
                "go in and out"
            )
            return None, None
        check_vocabulary(imported.config, shared, directory)
        log.info("taking the tokenizer in %s to be the model's", paths.tokenizer)
        return shared, None
    if shared is None:
        return found, paths.tokenizer
    if shared.fingerprint() == found.fingerprint():
        return found, None
    log.info(
        "the tokenizer in %s is another one: the model's goes to %s",
        paths.tokenizer,
        directory / "tokenizer",
    )
    return found, directory / "tokenizer"


def checkpoint_state(
    imported: Imported, fingerprint: str | None, config: ImportConfig
) -> dict[str, Any]:
    """The JSON state that training would have saved, as far as upstream's metadata has it."""
    modern = imported.config.arch == "modern"
    given = imported.meta.get("user_config") or {}
    defaults = OptimizerConfig(**({} if modern else CLASSIC_RATES))
    names = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")
    rates = dataclasses.replace(
        defaults, **{name: float(given[name]) for name in names if given.get(name) is not None}
    )
    total = imported.meta.get("total_batch_size") or given.get("total_batch_size")
    return {
        "step": imported.step,
        "model_config": dataclasses.asdict(imported.config),
        "tokenizer": fingerprint,
        "byte_rule": imported.byte_rule,
        "data": None,
        "packing": "bestfit" if modern else "stream",
        "rates": dataclasses.asdict(rates),
        "lr_scale": 1.0,
        "total_batch_size": total if isinstance(total, int) and total > 0 else 524288,
        "imported": {"from": config.from_dir, "meta": imported.meta},
    }


def main(config: ImportConfig) -> None:
    paths = Paths.from_env()
    start(paths, config)
    assert config.from_dir is not None  # checked above
    source = user_path(config.from_dir)
    if not source.is_dir():
        raise NotFound(f"--from {source} is not a directory")
    given = user_path(config.tokenizer) if config.tokenizer else None
    imported = read_foreign(
        source,
        step=config.step,
        tokenizer=given,
        rotary_dtype=None if config.rotary_dtype == "auto" else config.rotary_dtype,
    )
    directory = paths.checkpoints(config.source) / (
        config.model_tag or f"d{imported.config.n_layer}"
    )
    if source.resolve().is_relative_to(directory.resolve()):
        raise UsageError(
            f"--from {source} lies in the directory to write: name another --model-tag"
        )
    tokenizer, place = choose_tokenizer(imported.tokenizer, paths, directory, imported)
    if place == paths.tokenizer:
        make_directory(place)
    fingerprint = tokenizer.fingerprint() if tokenizer else None
    with lock_tag(directory):
        # Nothing is refused after this point: --fresh may delete.
        claim_directory(directory, resume=None, fresh=config.fresh)
        if tokenizer is not None:
            keep_tokenizer(tokenizer, directory)
            if place is not None and not is_remote(directory):
                tokenizer.save(place)
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(
                imported.step,
                imported.params,
                None,
                checkpoint_state(imported, fingerprint, config),
            )
            checkpoints.wait()
    log.info(
        "imported a %s model of %d layers, %s parameters, step %d, to %s",
        imported.config.arch,
        imported.config.n_layer,
        f"{num_params(imported.config):,}",
        imported.step,
        directory,
    )


if __name__ == "__main__":
    cli.run(main, ImportConfig, prog="scripts.import_weights", description=__doc__)

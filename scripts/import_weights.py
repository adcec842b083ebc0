"""Import a trained model: nanochat's PyTorch checkpoint or a Hugging Face directory.

python -m scripts.import_weights --from ~/nanochat-d32 --source sft --model-tag d32
"""

import logging
from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.cli import LARGEST, directory_name, flag, user_path
from nanochat_jax.devices import DeviceFlags, start
from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.interop.transfer import save_imported
from nanochat_jax.model.size import num_params
from nanochat_jax.paths import CHECKPOINT_DIRS, Paths
from nanochat_jax.pretrained import read_foreign

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImportConfig(DeviceFlags):
    from_dir: str | None = flag(
        None,
        "directory with model_<step>.pt and meta_<step>.json, or with config.json and .safetensors",
        short="--from",
    )
    source: str = flag("base", "stage of the model", choices=[*CHECKPOINT_DIRS])
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
        "rotary tables of a classic model; auto: bfloat16 as in nanochat, float32 as in "
        "transformers (hf)",
        choices=["auto", "float32", "bfloat16"],
    )
    fresh: bool = flag(False, "delete the tag's existing checkpoints")

    def __post_init__(self) -> None:
        if self.from_dir is None:
            raise ValueError("--from is missing: give the directory of the checkpoint")


def main(config: ImportConfig) -> None:
    paths = Paths.from_env()
    start(paths, config)
    assert config.from_dir is not None  # checked above
    source = user_path(config.from_dir)
    if not source.is_dir():
        raise NotFound(f"--from {source} is not a directory")
    imported = read_foreign(
        source,
        step=config.step,
        tokenizer=user_path(config.tokenizer) if config.tokenizer else None,
        rotary_dtype=None if config.rotary_dtype == "auto" else config.rotary_dtype,
    )
    tag = config.model_tag or f"d{imported.config.n_layer}"
    directory = paths.checkpoints(config.source) / tag
    if source.resolve().is_relative_to(directory.resolve()):
        raise UsageError(
            f"--from {source} is inside the directory to write: choose another --model-tag"
        )
    save_imported(imported, paths, directory, origin=config.from_dir, fresh=config.fresh)
    model = f"{imported.config.arch} model of {imported.config.n_layer} layers"
    size = f"{num_params(imported.config):,}"
    log.info("imported a %s, %s parameters, step %d, to %s", model, size, imported.step, directory)


if __name__ == "__main__":
    cli.run(main, ImportConfig, prog="scripts.import_weights", description=__doc__)

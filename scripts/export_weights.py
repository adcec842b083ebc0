"""Export a trained model: nanochat's PyTorch checkpoint or a Hugging Face directory.

python -m scripts.export_weights --source sft --format hf --out ~/my-model
"""

import logging
from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import flag, user_path
from nanochat_jax.devices import StageFlags, start
from nanochat_jax.files import entries, new_directory
from nanochat_jax.interop.hf import write_hf
from nanochat_jax.interop.torch_checkpoint import write_checkpoint
from nanochat_jax.interop.transfer import upstream_meta
from nanochat_jax.model.size import num_params
from nanochat_jax.paths import Paths

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(StageFlags):
    format: str = flag(
        "nanochat",
        "nanochat: upstream's .pt files; hf: a directory for transformers",
        choices=["nanochat", "hf"],
    )
    out: str | None = flag(None, "directory to write; must be new or empty")
    dtype: str = flag(
        "float32",
        "dtype of the weights (hf only); bfloat16 rounds them",
        choices=["float32", "bfloat16"],
    )

    def __post_init__(self) -> None:
        if self.out is None:
            raise ValueError("--out is missing: give the directory to write")
        if self.dtype != "float32" and self.format != "hf":
            raise ValueError(
                f"--dtype {self.dtype} is for --format hf: nanochat's own files are float32"
            )


def main(config: ExportConfig) -> None:
    paths = Paths.from_env()
    start(paths, config)
    assert config.out is not None  # checked above
    out = user_path(config.out).absolute()
    with new_directory(out) as temporary:
        loaded = load_model(paths, config.source, tag=config.model_tag, step=config.step)
        model = (temporary, loaded.config, loaded.params, loaded.tokenizer)
        if config.format == "hf":
            write_hf(*model, dtype=config.dtype)
        else:
            rule = loaded.meta.get("byte_rule", "raw")
            write_checkpoint(*model, step=loaded.step, byte_rule=rule, meta=upstream_meta(loaded))
    for path in sorted(entries(out)):
        log.info("%14s  %s", f"{path.stat().st_size:,}", path.name)
    name = f"{loaded.source}/{loaded.tag} step {loaded.step}"
    log.info("exported %s, %s parameters, to %s", name, f"{num_params(loaded.config):,}", out)
    if config.format == "hf" and loaded.config.arch == "modern":
        log.info("load it with trust_remote_code=True: the model's code is in the directory")


if __name__ == "__main__":
    cli.run(main, ExportConfig, prog="scripts.export_weights", description=__doc__)

"""Export a trained model: nanochat's PyTorch checkpoint or a Hugging Face directory.

python -m scripts.export_weights --source sft --format hf --out ~/my-model
python -m scripts.export_weights --source sft --push OWNER/NAME     to the Hugging Face Hub
"""

import contextlib
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax import cli
from nanochat_jax.checkpoint import Loaded, load_model
from nanochat_jax.cli import flag, user_path
from nanochat_jax.devices import StageFlags, start
from nanochat_jax.files import entries, new_directory
from nanochat_jax.interop.hf import write_hf
from nanochat_jax.interop.push import create_repository, push, valid_name, write_card
from nanochat_jax.interop.torch_checkpoint import write_checkpoint
from nanochat_jax.interop.transfer import upstream_meta
from nanochat_jax.model.size import num_params
from nanochat_jax.paths import Paths
from nanochat_jax.report.sections import read_sections
from nanochat_jax.report.summary import figures_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(StageFlags):
    format: str | None = flag(
        None,
        "nanochat: upstream's .pt files (default); hf: a directory for transformers",
        choices=["nanochat", "hf"],
    )
    out: str | None = flag(None, "directory to write; must be new or empty; optional with --push")
    dtype: str = flag(
        "float32",
        "dtype of the weights (hf only); bfloat16 rounds them",
        choices=["float32", "bfloat16"],
    )
    push: str | None = flag(
        None, "OWNER/NAME on the Hugging Face Hub to upload to, with a model card; implies hf"
    )
    private: bool = flag(False, "create the Hub's repository as private")

    def __post_init__(self) -> None:
        pushed, is_hf = self.push is not None, self.format == "hf" or self.push is not None
        for wrong, message in (
            (self.out is None and not pushed, "--out is missing: give the directory to write"),
            (pushed and not valid_name(str(self.push)), "--push must be like OWNER/NAME"),
            (pushed and self.format == "nanochat", "--push is for --format hf"),
            (self.private and not pushed, "--private is for --push OWNER/NAME"),
            (self.dtype != "float32" and not is_hf, f"--dtype {self.dtype} is for --format hf"),
        ):
            if wrong:
                raise ValueError(message)
        object.__setattr__(self, "format", "hf" if is_hf else "nanochat")


def main(config: ExportConfig) -> None:
    paths = Paths.from_env()
    start(paths, config)
    if config.push is not None:
        create_repository(config.push, private=config.private)
    with contextlib.ExitStack() as stack:
        out = config.out or stack.enter_context(tempfile.TemporaryDirectory())
        directory = user_path(out).absolute()
        with new_directory(directory) as temporary:
            loaded = _write(config, paths, temporary)
        for path in sorted(entries(directory)):
            log.info("%14s  %s", f"{path.stat().st_size:,}", path.name)
        name = f"{loaded.source}/{loaded.tag} step {loaded.step}"
        log.info(f"exported {name}, {num_params(loaded.config):,} parameters, to {directory}")
        if config.push is not None:
            log.info("uploaded to %s", push(directory, config.push, f"Upload {name}"))
    if config.format == "hf" and loaded.config.arch == "modern":
        log.info(
            "load it with trust_remote_code=True: the model's code is in the directory. vLLM runs "
            "only models trained with --arch classic"
        )


def _write(config: ExportConfig, paths: Paths, directory: Path) -> Loaded:
    loaded = load_model(paths, config.source, tag=config.model_tag, step=config.step)
    model = (directory, loaded.config, loaded.params, loaded.tokenizer)
    if config.format == "hf":
        write_hf(*model, dtype=config.dtype)
    else:
        rule = loaded.meta.get("byte_rule", "raw")
        write_checkpoint(*model, step=loaded.step, byte_rule=rule, meta=upstream_meta(loaded))
    if config.push is not None:
        sections = read_sections(paths.report, strict=False)
        figures = figures_of(sections, loaded.source, loaded.tag, loaded.step)
        write_card(directory, loaded, config.push, figures)
    return loaded


if __name__ == "__main__":
    cli.run(main, ExportConfig, prog="scripts.export_weights", description=__doc__)

"""Reference data made by upstream's code: tiny models with activations, small trained models."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from nanochat_jax.interop.torch_checkpoint import entries, read_checkpoint, to_params
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.tokenizer import Tokenizer


def golden_sets() -> list[Path]:
    """Directories with reference activations; none where there is no reference data."""
    folder = os.environ.get("NANOCHAT_TEST_DATA")
    return (
        sorted(path.parent for path in Path(folder).glob("golden/*/activations.safetensors"))
        if folder
        else []
    )


def load_golden(directory: Path, name: str, config: GPTConfig) -> dict[str, Any]:
    """A tree of parameters or gradients, by upstream's names in `<name>.safetensors`."""
    path = directory / f"{name}.safetensors"
    return jax.tree.map(
        jnp.asarray, to_params(load_file(path), list(entries(config)), config, where=path)
    )


class Trained(NamedTuple):
    config: GPTConfig
    params: Any
    tokenizer: Tokenizer
    directory: Path


def load_trained(test_data: Path, era: str) -> Trained:
    directory = test_data / "golden" / f"trained-{era}"
    found = read_checkpoint(directory)
    return Trained(
        found.config, jax.tree.map(jnp.asarray, found.params), found.tokenizer, directory
    )

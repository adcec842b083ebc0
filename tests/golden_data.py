"""Reference data that upstream's code made: tiny models with their activations, a vocabulary, and
small trained models."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from nanochat_jax.interop.torch_checkpoint import entries, read_checkpoint, to_params
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.tokenizer import RANKS_FILE, Tokenizer, _parse_ranks

GOLDEN = Path(__file__).with_name("golden")  # golden/README.md describes it


def golden_sets() -> list[Path]:
    """Directories with reference activations: the repository's, and others where there are some."""
    ours, seen = sorted(GOLDEN.glob("*/activations.safetensors")), set()
    folder = os.environ.get("NANOCHAT_TEST_DATA")
    others = sorted(Path(folder).glob("golden/*/activations.safetensors")) if folder else []
    found = []
    for path in (*ours, *others):
        if (content := path.read_bytes()) not in seen:
            seen.add(content)
            found.append(path.parent)
    return found


def golden_tokenizer() -> tuple[Tokenizer, dict[str, Any]]:
    """A vocabulary that upstream trained, and what upstream makes of texts and conversations."""
    path = GOLDEN / "tokenizer" / RANKS_FILE
    expected = json.loads(path.with_name("expected.json").read_text(encoding="utf-8"))
    return Tokenizer(_parse_ranks(path.read_bytes(), path)), expected


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

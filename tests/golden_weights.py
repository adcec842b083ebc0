"""Reference tensors in upstream's names and torch layout (out, in), as our parameter tree."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from nanochat_jax.config import GPTConfig

MATRICES = {"c_q": "attn.c_q", "c_k": "attn.c_k", "c_v": "attn.c_v", "c_proj": "attn.c_proj",
            "mlp_fc": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}


def golden_config(directory: Path) -> GPTConfig:
    shape = json.loads((directory / "meta_000000.json").read_text())["model_config"]
    if directory.name == "classic":
        return GPTConfig.classic(shape["n_layer"], rotary_dtype="bfloat16", **shape)
    return GPTConfig.modern(shape["n_layer"], **shape)


def to_params(tensors: dict[str, np.ndarray], config: GPTConfig) -> dict:
    def layer(i: int, name: str) -> np.ndarray:
        return tensors[f"transformer.h.{i}.{name}.weight"].T

    params = {
        "wte": tensors["transformer.wte.weight"],
        "lm_head": tensors["lm_head.weight"].T,
        "blocks": {ours: np.stack([layer(i, theirs) for i in range(config.n_layer)]) for ours, theirs in MATRICES.items()},
    }
    if config.value_embeds:
        params["value_embeds"] = np.stack([tensors[f"value_embeds.{i}.weight"] for i in config.value_embed_layers])
        params["ve_gate"] = np.stack([layer(i, "attn.ve_gate") for i in config.value_embed_layers])
    for name in ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"):
        if name in tensors:
            params[name] = tensors[name]
    if config.smear:
        params["smear_gate"] = tensors["smear_gate.weight"].T
    return params


def load_golden(directory: Path, name: str, config: GPTConfig) -> dict:
    return jax.tree.map(jnp.asarray, to_params(load_file(directory / f"{name}.safetensors"), config))

"""Hugging Face directories, which `transformers.AutoModelForCausalLM` and `AutoTokenizer` load.

A classic model is transformers' own NanoChat. transformers has no modern NanoChat, and would only
warn about tensors that it does not know, so a modern model is exported with its own code
(`modeling_nanochat_modern.py`, `configuration_nanochat_modern.py`, `trust_remote_code=True`).
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanochat_jax.errors import MALFORMED, NotFound, explaining
from nanochat_jax.files import parse_json
from nanochat_jax.interop.hf_tokenizer import read_hf_tokenizer, write_hf_tokenizer
from nanochat_jax.interop.torch_checkpoint import (
    NAMES,
    Entry,
    Imported,
    check_vocabulary,
    entries,
    from_params,
    read_tokenizer,
    to_params,
    upstream_shape,
)
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.layers import RMS_EPS
from nanochat_jax.model.weights import Params
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MODELING = Path(__file__).with_name("modeling_nanochat_modern.py")
CONFIGURATION = MODELING.with_name("configuration_nanochat_modern.py")
FIELDS = {  # of transformers' config -> of ours
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "max_position_embeddings": "sequence_len",
}
CLASSIC_NAMES = {
    "wte": "model.embed_tokens.weight",
    "lm_head": "lm_head.weight",
    "c_q": "model.layers.{layer}.self_attn.q_proj.weight",
    "c_k": "model.layers.{layer}.self_attn.k_proj.weight",
    "c_v": "model.layers.{layer}.self_attn.v_proj.weight",
    "c_proj": "model.layers.{layer}.self_attn.o_proj.weight",
    "mlp_fc": "model.layers.{layer}.mlp.fc1.weight",
    "mlp_proj": "model.layers.{layer}.mlp.fc2.weight",
}


def _classic_config(config: GPTConfig) -> dict[str, Any]:
    """transformers' NanoChatConfig. Its types are strict: 15 in place of 15.0 would be refused."""
    upstream_shape(config, "transformers", free=("rotary_dtype", "rotary_base", "softcap"))
    if config.rotary_dtype != "float32":
        log.warning(
            "this model rounds its rotary tables to %s, as nanochat did; transformers rounds them "
            "to the dtype of its activations: in float32 its logits differ by about 0.01",
            config.rotary_dtype,
        )
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        **_common_config(config),
        "intermediate_size": 4 * config.n_embd,
        "head_dim": config.head_dim,
        "hidden_act": "relu2",
        "attention_dropout": 0.0,
        "attention_bias": False,
        "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rotary_base)},
    }


def _common_config(config: GPTConfig) -> dict[str, Any]:
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    softcap = float(config.softcap)
    return fields | {"rms_norm_eps": RMS_EPS, "final_logit_softcapping": softcap}


def _modern_config(config: GPTConfig) -> dict[str, Any]:
    upstream_shape(config, MODELING.name)
    return {
        "architectures": ["NanoChatModernForCausalLM"],
        "model_type": "nanochat_modern",
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION.stem}.NanoChatModernConfig",
            "AutoModelForCausalLM": f"{MODELING.stem}.NanoChatModernForCausalLM",
        },
        **_common_config(config),
        "padded_vocab_size": config.padded_vocab_size,
        "window_pattern": config.window_pattern,
        "windows": list(config.windows),
        "value_embed_layers": list(config.value_embed_layers),
        "rotary_base": float(config.rotary_base),
        "qk_scale": float(config.qk_scale),
    }


def write_hf(
    directory: Path,
    config: GPTConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    dtype: str = "float32",
) -> None:
    """Write a model as transformers loads it.

    Args:
      dtype: "float32" keeps the weights exactly; "bfloat16" rounds them and halves the file.

    Raises `UsageError` for a model that the target's code would compute differently.
    """
    modern = config.arch == "modern"
    bos, end = tokenizer.bos_id, tokenizer.encode_special("<|assistant_end|>")
    shape = _modern_config(config) if modern else _classic_config(config)
    # transformers does not train the embedding of a pad id, so the model has none
    shape |= {
        "bos_token_id": bos,
        "eos_token_id": end,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": dtype,
    }
    generation = {
        "bos_token_id": bos,
        "eos_token_id": [end, bos],
        "pad_token_id": bos,
        "max_new_tokens": 256,
    }
    tensors = from_params(params, entries(config, NAMES if modern else CLASSIC_NAMES))
    if dtype == "bfloat16":
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    write_hf_tokenizer(tokenizer, directory, model_max_length=config.sequence_len)
    for name, content in (("config.json", shape), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    if modern:
        for file in (MODELING, CONFIGURATION):
            shutil.copyfile(file, directory / file.name)
    weights = directory / "model.safetensors"
    with explaining(f"{weights} could not be written", "", SafetensorError):
        save_file(tensors, weights, metadata={"format": "pt"})
    # safetensors makes the file readable by its owner only
    weights.chmod((directory / "config.json").stat().st_mode)


def read_hf(
    directory: Path, *, tokenizer: Path | None = None, rotary_dtype: str | None = None
) -> Imported:
    """Read a NanoChat directory of transformers, or a modern model that `write_hf` wrote.

    Args:
      tokenizer: directory of its tokenizer, if it has no `tokenizer.json`.
      rotary_dtype: of a classic model's rotary tables; default float32, as in transformers.
    """
    path = directory / "config.json"
    what = f"{path} is not the config of a nanochat model"
    with explaining(what, "", *MALFORMED, ArithmeticError):
        shape = parse_json(path.read_bytes())
        config, table = _read_config(shape, rotary_dtype)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise NotFound(f"no .safetensors file in {directory}")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        # the library's errors have no public base class
        with explaining(f"{file} cannot be read", "", Exception):
            with safe_open(file, framework="numpy") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    params = to_params(tensors, table, config, where=directory)
    vocabulary = directory / "tokenizer.json"
    words = None
    if tokenizer:
        words = read_tokenizer(tokenizer)
    elif vocabulary.is_file():
        words = read_hf_tokenizer(vocabulary)
    check_vocabulary(config, words, directory)
    return Imported(config, params, words, 0, {"model_config": shape})


def _read_config(shape: dict[str, Any], rotary_dtype: str | None) -> tuple[GPTConfig, list[Entry]]:
    common = {ours: shape[theirs] for theirs, ours in FIELDS.items()}
    common["softcap"] = shape["final_logit_softcapping"]
    if shape["model_type"] == "nanochat_modern":
        config = GPTConfig.modern(
            common["n_layer"], window_pattern=shape["window_pattern"], **common
        )
        expected = _modern_config(config)
        del expected["auto_map"]  # the names of files, not the model
        if expected != {key: shape.get(key) for key in expected}:
            raise ValueError("its fields contradict each other")
        return config, entries(config)
    if shape["model_type"] != "nanochat":
        raise ValueError(f"model_type is {shape['model_type']!r}")
    rope = shape.get("rope_parameters") or {"rope_theta": shape["rope_theta"]}
    if shape.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ValueError("it scales its rotary embedding")
    if shape["rms_norm_eps"] > 1e-5:  # the difference to transformers' 1e-6 is negligible
        raise ValueError(f"rms_norm_eps is {shape['rms_norm_eps']}, not {RMS_EPS}")
    config = GPTConfig.classic(
        common["n_layer"],
        rotary_base=rope["rope_theta"],
        rotary_dtype=rotary_dtype or "float32",
        **common,
    )
    fixed = dict(intermediate_size=4 * config.n_embd, attention_bias=False, hidden_act="relu2")
    if changed := [key for key, value in fixed.items() if shape.get(key, value) != value]:
        raise ValueError(f"{changed[0]} is {shape[changed[0]]!r}, not {fixed[changed[0]]!r}")
    return config, entries(config, CLASSIC_NAMES)

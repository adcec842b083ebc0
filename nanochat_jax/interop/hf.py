"""Hugging Face directories, both ways: what `transformers.AutoModelForCausalLM` and
`AutoTokenizer` load.

A classic model is transformers' own NanoChat. transformers has no modern one, and would drop the
tensors it does not know with a warning, so a modern model brings its own code
(`modeling_nanochat_modern.py`, `trust_remote_code=True`).
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

from nanochat_jax.errors import NotFound, UsageError, one_line
from nanochat_jax.files import parse_json
from nanochat_jax.interop.hf_tokenizer import read_hf_tokenizer, write_hf_tokenizer
from nanochat_jax.interop.torch_checkpoint import (
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
LAYER_NAMES = {
    "c_q": "self_attn.q_proj",
    "c_k": "self_attn.k_proj",
    "c_v": "self_attn.v_proj",
    "c_proj": "self_attn.o_proj",
    "mlp_fc": "mlp.fc1",
    "mlp_proj": "mlp.fc2",
}


def classic_entries(config: GPTConfig) -> list[Entry]:
    """Every tensor of a classic model by transformers' name."""
    return [
        Entry("model.embed_tokens.weight", ("wte",), None, False),
        Entry("lm_head.weight", ("lm_head",), None, True),
    ] + [
        Entry(f"model.layers.{layer}.{theirs}.weight", ("blocks", ours), layer, True)
        for layer in range(config.n_layer)
        for ours, theirs in LAYER_NAMES.items()
    ]


def _classic_config(config: GPTConfig) -> dict[str, Any]:
    """transformers' NanoChatConfig; it is strictly typed, so that 15 for 15.0 would be refused."""
    plain = dict(
        arch="classic",
        window_pattern=None,
        qk_scale=1.0,
        value_embeds=False,
        smear=False,
        lambdas=False,
        backout=False,
        padded_vocab_size=config.vocab_size,
    )
    if changed := [name for name, value in plain.items() if getattr(config, name) != value]:
        raise UsageError(
            "transformers' NanoChat has no model with "
            + ", ".join(f"{name}={getattr(config, name)!r}" for name in changed)
            + ": it cannot be exported to it"
        )
    if config.rotary_dtype != "float32":
        log.warning(
            "this model rounds its rotary tables to %s, as nanochat did; transformers rounds them "
            "to the dtype of "
            "its activations: in float32 its logits differ by about 0.01",
            config.rotary_dtype,
        )
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": "relu2",
        "attention_dropout": 0.0,
        "attention_bias": False,
        "rms_norm_eps": RMS_EPS,
        "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rotary_base)},
        "final_logit_softcapping": float(config.softcap),
    }


def _modern_config(config: GPTConfig) -> dict[str, Any]:
    upstream_shape(config)  # refuses what the model's code does not compute
    name = MODELING.stem
    return {
        "architectures": ["NanoChatModernForCausalLM"],
        "model_type": "nanochat_modern",
        "auto_map": {
            "AutoConfig": f"{name}.NanoChatModernConfig",
            "AutoModelForCausalLM": f"{name}.NanoChatModernForCausalLM",
        },
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "window_pattern": config.window_pattern,
        "windows": list(config.windows),
        "value_embed_layers": list(config.value_embed_layers),
        "rotary_base": float(config.rotary_base),
        "qk_scale": float(config.qk_scale),
        "final_logit_softcapping": float(config.softcap),
        "rms_norm_eps": RMS_EPS,
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

    Raises `UsageError` for a model that the target's code would compute otherwise.
    """
    modern = config.arch == "modern"
    bos, end = tokenizer.bos_id, tokenizer.encode_special("<|assistant_end|>")
    shape = _modern_config(config) if modern else _classic_config(config)
    # A pad id would make the embedding's row untrainable in transformers, so the model is given
    # none.
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
    tensors = from_params(params, (entries if modern else classic_entries)(config))
    if dtype == "bfloat16":
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    write_hf_tokenizer(tokenizer, directory, model_max_length=config.sequence_len)
    for name, content in (("config.json", shape), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    if modern:
        shutil.copyfile(MODELING, directory / MODELING.name)
    weights = directory / "model.safetensors"
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UsageError(f"{weights} could not be written: {one_line(error)}") from error
    # safetensors writes for this user alone
    weights.chmod((directory / "config.json").stat().st_mode)


def read_hf(
    directory: Path, *, tokenizer: Path | None = None, rotary_dtype: str | None = None
) -> Imported:
    """Read a NanoChat directory of transformers, or one that `write_hf` made of a modern model.

    `tokenizer` is the directory of its tokenizer, if that is not in `tokenizer.json`;
    `rotary_dtype` that of a classic model's rotary tables, default float32 as transformers'.
    """
    path = directory / "config.json"
    try:
        shape = parse_json(path.read_bytes())
        config, table = _read_config(shape, rotary_dtype)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UsageError(f"{path} is not the config of a nanochat model ({error!r})") from error
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise NotFound(f"no .safetensors file in {directory}")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
        except Exception as error:  # the library has no public base of its errors
            raise UsageError(f"{file} cannot be read ({one_line(error)})") from error
    params = to_params(tensors, table, config, where=directory)
    path = directory / "tokenizer.json"
    found = (
        read_tokenizer(tokenizer)
        if tokenizer
        else read_hf_tokenizer(path)
        if path.is_file()
        else None
    )
    check_vocabulary(config, found, directory)
    return Imported(config, params, found, 0, {"model_config": shape})


def _read_config(shape: dict[str, Any], rotary_dtype: str | None) -> tuple[GPTConfig, list[Entry]]:
    common = dict(
        sequence_len=shape["max_position_embeddings"],
        vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_kv_head=shape["num_key_value_heads"],
        n_embd=shape["hidden_size"],
        softcap=shape["final_logit_softcapping"],
    )
    if shape["model_type"] == "nanochat_modern":
        config = GPTConfig.modern(
            common["n_layer"], window_pattern=shape["window_pattern"], **common
        )
        if _modern_config(config) != {key: shape.get(key) for key in _modern_config(config)}:
            raise ValueError("its fields do not belong together")
        return config, entries(config)
    if shape["model_type"] != "nanochat":
        raise ValueError(f"model_type is {shape['model_type']!r}")
    rope = shape.get("rope_parameters") or {"rope_theta": shape["rope_theta"]}
    if shape.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ValueError("it scales its rotary embedding")
    if shape["rms_norm_eps"] > 1e-5:  # 1e-6, transformers' own, changes nothing that can be seen
        raise ValueError(f"rms_norm_eps is {shape['rms_norm_eps']}, not {RMS_EPS}")
    config = GPTConfig.classic(
        common["n_layer"],
        rotary_base=rope["rope_theta"],
        rotary_dtype=rotary_dtype or "float32",
        **common,
    )
    expected = dict(intermediate_size=4 * config.n_embd, attention_bias=False, hidden_act="relu2")
    if changed := [key for key, value in expected.items() if shape.get(key, value) != value]:
        raise ValueError(f"{changed[0]} is {shape[changed[0]]!r}, not {expected[changed[0]]!r}")
    return config, classic_entries(config)

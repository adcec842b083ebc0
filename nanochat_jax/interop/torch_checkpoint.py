"""PyTorch nanochat's checkpoints: model, metadata and tokenizer, of both architectures, in and out.

    model_<step>.pt, meta_<step>.json
    tokenizer.pkl, token_bytes.pt       in the same directory, in `tokenizer/` in it, or in
                                        `tokenizer/` of the base directory

torch stores a matrix as (out, in); ours are [in, out], and equal layers are stacked.
"""

import dataclasses
import functools
import json
import operator
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import ml_dtypes
import numpy as np
import tiktoken

from nanochat_jax.errors import NotFound, UsageError, explaining
from nanochat_jax.files import parse_json
from nanochat_jax.interop.torch_file import read_encoding, read_pt, write_pt
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import Params, abstract_params, layer_weights
from nanochat_jax.paths import base_tokenizer
from nanochat_jax.tokenizer import RANKS_FILE, ByteRule, Tokenizer

SHAPE_FIELDS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
# Our weight -> upstream's tensor, or one tensor per layer. Matrices are transposed, except tables.
NAMES = {
    "wte": "transformer.wte.weight",
    "lm_head": "lm_head.weight",
    "c_q": "transformer.h.{layer}.attn.c_q.weight",
    "c_k": "transformer.h.{layer}.attn.c_k.weight",
    "c_v": "transformer.h.{layer}.attn.c_v.weight",
    "c_proj": "transformer.h.{layer}.attn.c_proj.weight",
    "mlp_fc": "transformer.h.{layer}.mlp.c_fc.weight",
    "mlp_proj": "transformer.h.{layer}.mlp.c_proj.weight",
    "ve_gate": "transformer.h.{layer}.attn.ve_gate.weight",
    "value_embeds": "value_embeds.{layer}.weight",
    "smear_gate": "smear_gate.weight",
    "resid_lambdas": "resid_lambdas",
    "x0_lambdas": "x0_lambdas",
    "smear_lambda": "smear_lambda",
    "backout_lambda": "backout_lambda",
}
TABLES = ("wte", "value_embeds")


class Entry(NamedTuple):
    """A foreign tensor and its position in our parameters."""

    name: str
    path: tuple[str, ...]
    position: int | None  # on the leading axis of a stack; None: the whole parameter
    transposed: bool


@dataclass(frozen=True)
class Imported:
    """A foreign checkpoint in our form: parameters are float32 arrays on the host."""

    config: GPTConfig
    params: Params
    tokenizer: Tokenizer | None
    step: int
    meta: dict[str, Any]
    byte_rule: ByteRule = "raw"  # how a token's bytes are counted for bits per byte


def entries(config: GPTConfig, names: Mapping[str, str] = NAMES) -> list[Entry]:
    """All tensors of a model, by the names of another program.

    Raises `UsageError` if `names` lacks a weight that the model declares.
    """
    weights = {path[-1].key: path for path, _ in jax.tree.leaves_with_path(abstract_params(config))}
    if unknown := sorted(set(weights) - set(names)):
        raise UsageError(
            f"the model has weights that the other program lacks: {', '.join(unknown)}; it can be "
            "neither imported nor exported"
        )
    table = []
    for weight, keys in weights.items():
        name, path = names[weight], tuple(key.key for key in keys)
        stack = enumerate(layer_weights(config)[weight][1]) if "{layer}" in name else [(None, None)]
        table += [
            Entry(name.format(layer=layer), path, index, weight not in TABLES)
            for index, layer in stack
        ]
    return table


def _leaf(tree: Any, path: Sequence[str]) -> Any:
    return functools.reduce(operator.getitem, path, tree)


def to_params(
    tensors: Mapping[str, np.ndarray], table: Sequence[Entry], config: GPTConfig, *, where: Path
) -> Params:
    """Our parameters, float32, from foreign tensors by name.

    Raises `UsageError` with the name of a tensor that is missing, unexpected, has another shape or
    is not of floats.
    """
    names = {entry.name for entry in table}
    for problem, wrong in (
        ("lacks", names - set(tensors)),
        ("has unexpected", set(tensors) - names),
    ):
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UsageError(
                f"{where} {problem} tensors {', '.join(sorted(wrong)[:3])}{more} for a "
                f"{config.arch} model of {config.n_layer} layers: nothing was imported"
            )
    shapes = abstract_params(config)
    params: Params = {key: {} if isinstance(value, dict) else None for key, value in shapes.items()}
    for entry in table:
        shape, tensor = _leaf(shapes, entry.path).shape, tensors[entry.name]
        expected = shape if entry.position is None else shape[1:]
        expected = expected[::-1] if entry.transposed else expected
        if tensor.shape != expected:
            raise UsageError(
                f"{where}: {entry.name} has shape {tensor.shape}, the model's config makes it "
                f"{expected}"
            )
        if tensor.dtype not in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16):
            raise UsageError(
                f"{where}: {entry.name} has dtype {tensor.dtype}, weights must be floats"
            )
        tensor = tensor.T if entry.transposed else tensor
        owner, last = _leaf(params, entry.path[:-1]), entry.path[-1]
        if entry.position is None:
            owner[last] = np.ascontiguousarray(tensor, np.float32)
        else:
            if owner.get(last) is None:
                owner[last] = np.empty(shape, np.float32)
            owner[last][entry.position] = tensor
    return params


def from_params(params: Params, table: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Foreign tensors by name, float32."""
    tensors = {}
    for entry in table:
        leaf = np.asarray(_leaf(params, entry.path), np.float32)
        leaf = leaf if entry.position is None else leaf[entry.position]
        tensors[entry.name] = np.ascontiguousarray(leaf.T if entry.transposed else leaf)
    return tensors


def pick_step(directory: Path, step: int | None) -> int:
    """`step` if it has a model file; by default the greatest that has one."""
    steps = sorted(
        int(match[1])
        for path in directory.glob("model_*.pt")
        if (match := re.fullmatch(r"model_(\d+)\.pt", path.name))
    )
    if not steps:
        raise NotFound(
            f"no model_<step>.pt in {directory}: give the directory of a nanochat checkpoint"
        )
    if step is not None and step not in steps:
        raise NotFound(f"no step {step} in {directory}: there are {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def read_checkpoint(
    directory: Path,
    *,
    step: int | None = None,
    tokenizer: Path | None = None,
    rotary_dtype: str | None = None,
) -> Imported:
    """Read one step of an upstream checkpoint directory, of either architecture.

    Args:
      step: default the greatest.
      tokenizer: directory of its tokenizer; default see `find_tokenizer`. May be missing.
      rotary_dtype: of a classic model's rotary tables; default bfloat16, to which upstream rounds
        them.

    Raises `NotFound` and `UsageError`, with the name of the file or tensor.
    """
    step = pick_step(directory, step)
    model_path, meta_path = directory / f"model_{step:06d}.pt", directory / f"meta_{step:06d}.json"
    if not meta_path.exists():
        raise NotFound(f"{meta_path} does not exist: it has the model's shape")
    with explaining(f"{meta_path} holds no model_config"):
        meta = parse_json(meta_path.read_bytes())
        shape = dict(meta["model_config"])
    tensors = read_pt(model_path)
    if not isinstance(tensors, dict) or not all(
        isinstance(value, np.ndarray) for value in tensors.values()
    ):
        raise UsageError(f"{model_path} is not a state dict of tensors")
    tensors = {name.removeprefix("_orig_mod."): value for name, value in tensors.items()}
    config = _config(shape, tensors, meta_path, rotary_dtype)
    params = to_params(tensors, entries(config), config, where=model_path)
    vocabulary = tokenizer or find_tokenizer(directory)
    words = read_tokenizer(vocabulary) if vocabulary else None
    check_vocabulary(config, words, directory)
    return Imported(config, params, words, step, meta, _byte_rule(words, vocabulary))


def _config(
    shape: dict[str, Any], tensors: Mapping[str, np.ndarray], where: Path, rotary_dtype: str | None
) -> GPTConfig:
    modern = "window_pattern" in shape or "resid_lambdas" in tensors
    fields = {*SHAPE_FIELDS, *["window_pattern"] * modern}
    if modern:
        shape.setdefault("window_pattern", "L")  # as upstream does for its older checkpoints
    if set(shape) != fields:
        raise UsageError(
            f"{where}: model_config has fields {sorted(shape)}, expected {sorted(fields)}"
        )
    if wrong := [name for name in SHAPE_FIELDS if type(shape[name]) is not int]:
        raise UsageError(f"{where}: {wrong[0]} must be an integer, got {shape[wrong[0]]!r}")
    try:
        if modern:
            return GPTConfig.modern(shape["n_layer"], **shape)
        return GPTConfig.classic(shape["n_layer"], rotary_dtype=rotary_dtype or "bfloat16", **shape)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}: {error}") from error


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in a directory: upstream's pickle or our text files."""
    if not (path := directory / "tokenizer.pkl").is_file():
        if (directory / RANKS_FILE).is_file():
            return Tokenizer.load(directory)
        raise NotFound(f"no tokenizer.pkl and no {RANKS_FILE} in {directory}")
    encoding = read_encoding(path)
    try:
        return Tokenizer.from_ids(
            encoding.mergeable_ranks, encoding.special_tokens, encoding.pattern
        )
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def find_tokenizer(directory: Path) -> Path | None:
    """Directory of a checkpoint's tokenizer: that directory, or `tokenizer/` in it or its base."""
    candidates = (directory, directory / "tokenizer", base_tokenizer(directory))
    names = ("tokenizer.pkl", RANKS_FILE)
    return next((p for p in candidates if any((p / name).is_file() for name in names)), None)


def _byte_rule(tokenizer: Tokenizer | None, directory: Path | None) -> ByteRule:
    """The rule that made the `token_bytes.pt` beside a tokenizer; "raw" without this file."""
    if not tokenizer or not directory or not (path := directory / "token_bytes.pt").is_file():
        return "raw"
    counts = read_pt(path)
    for rule in get_args(ByteRule):
        if np.array_equal(counts, tokenizer.token_bytes(rule)):
            return rule
    raise UsageError(f"{path} does not belong to the tokenizer beside it")


def check_vocabulary(config: GPTConfig, tokenizer: Tokenizer | None, where: Path) -> None:
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise UsageError(
            f"the model in {where} has a vocabulary of {config.vocab_size}, its tokenizer one of "
            f"{tokenizer.vocab_size}: they do not belong together"
        )


def upstream_shape(
    config: GPTConfig, target: str = "nanochat", free: Sequence[str] = ("rotary_dtype",)
) -> dict[str, Any]:
    """Upstream's `model_config`.

    Raises `UsageError` if any field that is not in `free` differs from the architecture's: the
    target's code would compute something else.
    """
    shape = {name: getattr(config, name) for name in SHAPE_FIELDS}
    if config.arch == "modern":
        shape["window_pattern"] = config.window_pattern
        plain = GPTConfig.modern(config.n_layer, **shape)
    else:
        plain = GPTConfig.classic(config.n_layer, **shape)
    if changed := [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(GPTConfig)
        if field.name not in free and getattr(plain, field.name) != getattr(config, field.name)
    ]:
        raise UsageError(
            f"{target} has no {config.arch} model with {', '.join(sorted(changed))}: the model "
            "cannot be exported to it"
        )
    return shape


def write_checkpoint(
    directory: Path,
    config: GPTConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    step: int,
    meta: Mapping[str, Any],
    byte_rule: ByteRule = "raw",
) -> None:
    """Write model, metadata and tokenizer as upstream does."""
    shape = upstream_shape(config)
    tensors = from_params(params, table := entries(config))
    for name in (entry.name for entry in table if entry.path[-1] in TABLES):
        half = tensors[name].astype(ml_dtypes.bfloat16)
        if np.array_equal(half.astype(np.float32), tensors[name]):
            tensors[name] = half
    encoding = tiktoken.Encoding(
        "rustbpe",
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.mergeable_ranks,
        special_tokens=tokenizer.special_tokens,
    )
    (directory / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    write_pt(directory / "token_bytes.pt", tokenizer.token_bytes(byte_rule))
    meta = {"step": step, "model_config": shape, **meta}
    (directory / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=2) + "\n")
    write_pt(directory / f"model_{step:06d}.pt", tensors)

"""nanochat's PyTorch checkpoints: tensors by upstream's names, its metadata, its tokenizer. Both
ways, both eras.

    model_<step>.pt  meta_<step>.json        beside them, in `tokenizer/`, or in `tokenizer/` of
    the base directory: tokenizer.pkl    token_bytes.pt

torch keeps a matrix as (out, in); ours are [in, out] and equal layers are stacked.
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

import ml_dtypes
import numpy as np
import tiktoken

from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.files import parse_json
from nanochat_jax.interop.torch_file import read_encoding, read_pt, write_pt
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import Params, abstract_params
from nanochat_jax.paths import base_tokenizer
from nanochat_jax.tokenizer import RANKS_FILE, ByteRule, Tokenizer

# of upstream's model_config
SHAPE_FIELDS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
BLOCK_NAMES = {
    "c_q": "attn.c_q",
    "c_k": "attn.c_k",
    "c_v": "attn.c_v",
    "c_proj": "attn.c_proj",
    "mlp_fc": "mlp.c_fc",
    "mlp_proj": "mlp.c_proj",
}


class Entry(NamedTuple):
    """Where a foreign tensor lives in our parameters."""

    name: str
    path: tuple[str, ...]
    layer: int | None  # index on the leading axis of a stack
    transposed: bool


@dataclass(frozen=True)
class Imported:
    """A foreign checkpoint as ours: parameters are float32 arrays on the host."""

    config: GPTConfig
    params: Params
    tokenizer: Tokenizer | None
    step: int
    meta: dict[str, Any]
    byte_rule: ByteRule = "raw"  # how its bits per byte count a token's bytes


def entries(config: GPTConfig) -> list[Entry]:
    """Every tensor of a model by upstream's name."""
    found = [
        Entry("transformer.wte.weight", ("wte",), None, False),
        Entry("lm_head.weight", ("lm_head",), None, True),
    ]
    for layer in range(config.n_layer):
        found += [
            Entry(f"transformer.h.{layer}.{theirs}.weight", ("blocks", ours), layer, True)
            for ours, theirs in BLOCK_NAMES.items()
        ]
    for rank, layer in enumerate(config.value_embed_layers):
        found += [
            Entry(f"value_embeds.{layer}.weight", ("value_embeds",), rank, False),
            Entry(f"transformer.h.{layer}.attn.ve_gate.weight", ("ve_gate",), rank, True),
        ]
    if config.smear:
        found.append(Entry("smear_gate.weight", ("smear_gate",), None, True))
    scalars = {
        "resid_lambdas": config.lambdas,
        "x0_lambdas": config.lambdas,
        "smear_lambda": config.smear,
        "backout_lambda": config.backout,
    }
    return found + [Entry(name, (name,), None, False) for name, there in scalars.items() if there]


def _leaf(tree: Any, path: Sequence[str]) -> Any:
    return functools.reduce(operator.getitem, path, tree)


def to_params(
    tensors: Mapping[str, np.ndarray], table: Sequence[Entry], config: GPTConfig, *, where: Path
) -> Params:
    """Our parameters, float32, from tensors by their foreign names.

    Raises `UsageError`, naming the tensor, for one that is missing, unexpected, of another shape
    or not of floats.
    """
    known = {entry.name for entry in table}
    for kind, names in (("lacks", known - set(tensors)), ("has unexpected", set(tensors) - known)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(
                f"{where} {kind} tensors {', '.join(sorted(names)[:3])}{more} for a {config.arch} "
                "model of "
                f"{config.n_layer} layers: nothing was imported"
            )
    shapes = abstract_params(config)
    params: Params = {key: {} if isinstance(value, dict) else None for key, value in shapes.items()}
    for entry in table:
        shape = _leaf(shapes, entry.path).shape
        tensor = tensors[entry.name]
        expected = shape if entry.layer is None else shape[1:]
        found = tensor.shape[::-1] if entry.transposed else tensor.shape
        if found != expected:
            expected = expected[::-1] if entry.transposed else expected
            raise UsageError(
                f"{where}: {entry.name} has shape {tensor.shape}, the model's config makes it "
                f"{expected}"
            )
        if tensor.dtype not in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16):
            raise UsageError(
                f"{where}: {entry.name} has dtype {tensor.dtype}, weights must be floats"
            )
        tensor = tensor.T if entry.transposed else tensor
        *parents, last = entry.path
        owner = _leaf(params, parents)
        if entry.layer is None:
            owner[last] = np.ascontiguousarray(tensor, np.float32)
        else:
            if owner.get(last) is None:
                owner[last] = np.empty(shape, np.float32)
            owner[last][entry.layer] = tensor
    return params


def from_params(params: Params, table: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Tensors by their foreign names, float32."""
    tensors = {}
    for entry in table:
        leaf = np.asarray(_leaf(params, entry.path), np.float32)
        leaf = leaf if entry.layer is None else leaf[entry.layer]
        tensors[entry.name] = np.ascontiguousarray(leaf.T if entry.transposed else leaf)
    return tensors


def pick_step(directory: Path, step: int | None) -> int:
    """The step asked for, else the greatest that has a model file."""
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
    """Read one step of an upstream checkpoint directory, of either era.

    Args:
      step: default the greatest.
      tokenizer: directory of its tokenizer; default beside the checkpoint or in its base
        directory. None may be found.
      rotary_dtype: of the classic era's rotary tables; default bfloat16, to which upstream rounds
        them.

    Raises `NotFound` and `UsageError`, which name the file or the tensor.
    """
    step = pick_step(directory, step)
    model_path, meta_path = directory / f"model_{step:06d}.pt", directory / f"meta_{step:06d}.json"
    try:
        meta = parse_json(meta_path.read_bytes())
        shape = dict(meta["model_config"])
    except FileNotFoundError as error:
        raise NotFound(f"{meta_path} does not exist: the model's shape is in it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{meta_path} holds no model_config ({error!r})") from error
    tensors = read_pt(model_path)
    if not isinstance(tensors, dict) or not all(
        isinstance(value, np.ndarray) for value in tensors.values()
    ):
        raise UsageError(f"{model_path} is not a state dict of tensors")
    tensors = {name.removeprefix("_orig_mod."): value for name, value in tensors.items()}
    config = _config(shape, tensors, meta_path, rotary_dtype)
    params = to_params(tensors, entries(config), config, where=model_path)
    place = tokenizer or find_tokenizer(directory)
    found = read_tokenizer(place) if place else None
    check_vocabulary(config, found, directory)
    return Imported(config, params, found, step, meta, _byte_rule(found, place))


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
    """The tokenizer in a directory, upstream's pickle or our text files."""
    if not (path := directory / "tokenizer.pkl").is_file():
        if (directory / RANKS_FILE).is_file():
            return Tokenizer.load(directory)
        raise NotFound(f"no tokenizer.pkl and no {RANKS_FILE} in {directory}")
    encoding = read_encoding(path)
    special = sorted(encoding.special_tokens, key=encoding.special_tokens.__getitem__)
    first = len(encoding.mergeable_ranks)
    if [encoding.special_tokens[name] for name in special] != list(
        range(first, first + len(special))
    ):
        raise UsageError(f"{path}: the special tokens do not follow the {first} others")
    try:
        return Tokenizer(encoding.mergeable_ranks, pattern=encoding.pattern, special_tokens=special)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def find_tokenizer(directory: Path) -> Path | None:
    """Where a checkpoint's tokenizer lies: beside it, in `tokenizer/` under it, or in that of its
    base directory.
    """
    for place in (directory, directory / "tokenizer", base_tokenizer(directory)):
        if (place / "tokenizer.pkl").is_file() or (place / RANKS_FILE).is_file():
            return place
    return None


def _byte_rule(tokenizer: Tokenizer | None, place: Path | None) -> ByteRule:
    """Which rule made the `token_bytes.pt` beside a tokenizer; "raw" where there is none."""
    if tokenizer is None or place is None or not (path := place / "token_bytes.pt").is_file():
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


def upstream_shape(config: GPTConfig) -> dict[str, Any]:
    """Upstream's `model_config`. Raises `UsageError` for a model that upstream's code would
    compute otherwise.
    """
    shape = {name: getattr(config, name) for name in SHAPE_FIELDS}
    if config.arch == "modern":
        shape["window_pattern"] = config.window_pattern
        plain = GPTConfig.modern(config.n_layer, **shape)
    else:
        plain = GPTConfig.classic(config.n_layer, **shape)
    changed = {
        field.name
        for field in dataclasses.fields(GPTConfig)
        if getattr(plain, field.name) != getattr(config, field.name)
    } - {"rotary_dtype"}
    if changed:
        raise UsageError(
            f"nanochat has no {config.arch} model with "
            + ", ".join(f"{name}={getattr(config, name)!r}" for name in sorted(changed))
            + ": it cannot be exported to it"
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
    """Write model, metadata and tokenizer as upstream does.

    The embedding tables are bfloat16, as upstream's are on CUDA, if that loses nothing; otherwise
    float32, as on a CPU.
    """
    shape = upstream_shape(config)
    tensors = from_params(params, entries(config))
    for name, tensor in tensors.items():
        if name == "transformer.wte.weight" or name.startswith("value_embeds."):
            half = tensor.astype(ml_dtypes.bfloat16)
            if np.array_equal(half.astype(np.float32), tensor):
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

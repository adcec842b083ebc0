"""Every weight of the model, declared once: shape, logical axes, initial distribution, optimizer
group.

Initial values, abstract shapes, shardings, parameter counts, the layers of `gpt.forward` and the
optimizer's groups follow from these declarations. To add a weight, declare it here and use it in
`gpt.py`.

| weight | classic | modern |
|---|---|---|
| wte | N(0, 1) | N(0, 0.8^2) |
| lm_head | 0, so that the initial loss is exactly ln V | N(0, 0.001^2) |
| c_q, c_k, c_v | N(0, min(1, out/in) / in) | U(-b, b), b = sqrt(3 / D) |
| mlp_fc | as c_q | U(-0.4 b, 0.4 b) |
| c_proj, mlp_proj | 0 | 0 |
| value_embeds | | U(-b, b) |
| ve_gate, smear_gate | | U(0, 0.02) |
| resid_lambdas | | 1.15 falling linearly to 1.05 over the layers |
| x0_lambdas | | 0.20 falling linearly to 0.05 |
| smear_lambda, backout_lambda | | 0 and 0.2 |
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from nanochat_jax.model.config import SMEAR_GATE_CHANNELS, VE_GATE_CHANNELS, GPTConfig

Params = dict[str, Any]  # nested dict of arrays: params["wte"], params["blocks"]["c_q"]
Axes = tuple[str | None, ...]
Initial = Callable[[nnx.Rngs, tuple[int, ...]], Array]

# First logical axis of weights stacked per layer, and per layer with a value embedding.
LAYERS, VALUE_LAYERS = "layers", "value_layers"
# optimizer groups of several weights; other groups have the name of their only weight
MATRICES, SCALARS = "matrices", "scalars"
TABLES = ("wte", "value_embeds")  # weights whose rows are looked up


def _normal(std: float) -> Initial:
    return lambda rngs, shape: std * jax.random.normal(rngs.params(), shape)


def _uniform(low: float, high: float) -> Initial:
    return lambda rngs, shape: jax.random.uniform(rngs.params(), shape, minval=low, maxval=high)


def _constant(value: float) -> Initial:
    return lambda rngs, shape: jnp.full(shape, value)


def _falling(first: float, last: float) -> Initial:
    def values(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
        return first + (last - first) * jnp.arange(shape[0]) / max(shape[0] - 1, 1)

    return values


@dataclass(frozen=True)
class _Declare:
    """`declare(shape, axes, initial, group)`: an `nnx.Param` with its axes and optimizer group."""

    rngs: nnx.Rngs

    def __call__(
        self, shape: tuple[int, ...], axes: Axes, initial: Initial, group: str
    ) -> nnx.Param:
        if len(axes) != len(shape):
            raise ValueError(f"a weight of shape {shape} has {len(axes)} logical axes: {axes}")
        return nnx.Param(initial(self.rngs, shape), axes=axes, group=group)


class Blocks(nnx.Module):
    """The matrices of all layers, stacked on a leading axis: [L, in, out]."""

    def __init__(self, config: GPTConfig, declare: _Declare) -> None:
        width, hidden = config.n_embd, 4 * config.n_embd
        heads, kv_heads = config.n_head * config.head_dim, config.n_kv_head * config.head_dim

        def matrix(fan_in: int, fan_out: int, axes: Axes, initial: Initial) -> nnx.Param:
            return declare((config.n_layer, fan_in, fan_out), (LAYERS, *axes), initial, MATRICES)

        def spread(fan_in: int, fan_out: int, gain: float = 1.0) -> Initial:
            if config.arch == "classic":
                return _normal(min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))
            bound = gain * math.sqrt(3.0 / width)
            return _uniform(-bound, bound)

        self.c_q = matrix(width, heads, ("embed", "heads"), spread(width, heads))
        self.c_k = matrix(width, kv_heads, ("embed", "kv_heads"), spread(width, kv_heads))
        self.c_v = matrix(width, kv_heads, ("embed", "kv_heads"), spread(width, kv_heads))
        self.c_proj = matrix(heads, width, ("heads", "embed"), _constant(0.0))
        self.mlp_fc = matrix(width, hidden, ("embed", "mlp"), spread(width, hidden, gain=0.4))
        self.mlp_proj = matrix(hidden, width, ("mlp", "embed"), _constant(0.0))


class GPT(nnx.Module):
    """All weights. `gpt.forward` takes them as the plain dict of `init_params`."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        declare = _Declare(rngs)
        vocab, width, depth = config.padded_vocab_size, config.n_embd, config.n_layer
        classic = config.arch == "classic"
        self.wte = declare((vocab, width), (None, "embed"), _normal(1.0 if classic else 0.8), "wte")
        self.lm_head = declare(
            (width, vocab), ("embed", "vocab"), _normal(0.0 if classic else 0.001), "lm_head"
        )
        self.blocks = Blocks(config, declare)
        if count := len(config.value_embed_layers):
            bound = math.sqrt(3.0 / width)
            self.value_embeds = declare(
                (count, vocab, config.n_kv_head * config.head_dim),
                (VALUE_LAYERS, "rows", "kv_heads"),
                _uniform(-bound, bound),
                "value_embeds",
            )
            self.ve_gate = declare(
                (count, VE_GATE_CHANNELS, config.n_kv_head),
                (VALUE_LAYERS, None, None),
                _uniform(0.0, 0.02),
                MATRICES,
            )
        if config.lambdas:
            self.resid_lambdas = declare((depth,), (LAYERS,), _falling(1.15, 1.05), "resid_lambdas")
            self.x0_lambdas = declare((depth,), (LAYERS,), _falling(0.20, 0.05), "x0_lambdas")
        if config.smear:
            self.smear_gate = declare(
                (SMEAR_GATE_CHANNELS, 1), (None, None), _uniform(0.0, 0.02), SCALARS
            )
            self.smear_lambda = declare((1,), (None,), _constant(0.0), SCALARS)
        if config.backout:
            self.backout_lambda = declare((1,), (None,), _constant(0.2), SCALARS)


def init_params(config: GPTConfig, key: Array) -> Params:
    """Initial parameters, float32, from a PRNG key."""
    return nnx.to_pure_dict(nnx.split(GPT(config, rngs=nnx.Rngs(params=key)))[1])


@functools.lru_cache(maxsize=64)
def _declared(config: GPTConfig) -> nnx.State:
    return nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))[1]


def abstract_params(config: GPTConfig) -> Params:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`s."""
    return nnx.to_pure_dict(_declared(config))


def cast_tables(params: Params, dtype: Any) -> Params:
    """`params`, arrays or shapes, with the embedding tables in `dtype`."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=dtype)
        return leaf.astype(dtype)

    return params | {name: cast(params[name]) for name in TABLES if name in params}


def _metadata(config: GPTConfig, name: str) -> Params:
    is_weight = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda weight: weight.get_metadata()[name], _declared(config), is_leaf=is_weight
        )
    )


def logical_axes(config: GPTConfig) -> Params:
    """Logical axis names of each parameter, as a tree; sharding.py maps them to mesh axes."""
    return _metadata(config, "axes")


def optimizer_groups(config: GPTConfig) -> Params:
    """The optimizer group of each parameter, as a tree."""
    return _metadata(config, "group")


@functools.lru_cache(maxsize=64)
def layer_weights(config: GPTConfig) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """The per-layer weights: name -> (keys into the parameters, layers that have one)."""
    weights = {}
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    for path, axes in jax.tree.leaves_with_path(logical_axes(config), is_leaf=is_axes):
        if axes[0] in (LAYERS, VALUE_LAYERS):
            every = axes[0] == LAYERS
            layers = tuple(range(config.n_layer)) if every else config.value_embed_layers
            weights[path[-1].key] = (tuple(key.key for key in path), layers)
    return weights

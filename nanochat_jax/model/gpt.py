"""The forward pass of both architectures, for training, scoring, prefill and decoding.

    hidden, cache = forward(params, tokens, config, compute)
    logits = unembed(params, hidden, config=config)

`params` is the dict of `weights.init_params`; `config` says what is computed, `compute` how.

Letters: B batch, T new tokens, S cache length, D width, H query heads, K key/value heads, h head
width, F MLP width, L layers, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from nanochat_jax.model.attention import cached_attention, self_attention
from nanochat_jax.model.compute import REFERENCE, Compute
from nanochat_jax.model.config import SMEAR_GATE_CHANNELS, VE_GATE_CHANNELS, GPTConfig
from nanochat_jax.model.fast import linear, lookup, mlp, rotary_norm
from nanochat_jax.model.kernels import SAVE_MATMULS
from nanochat_jax.model.layers import rms_norm, rotary_tables
from nanochat_jax.model.weights import Params, layer_weights

Layer = dict[str, Array]  # the weights of one layer
Stacks = dict[str, Array | tuple[Array, ...]]  # by name, [L, ...] or L arrays
KV = tuple[Array, Array]  # keys and values of one layer, [B, K, S, h] each


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, one row per sequence. Rows can differ in length."""

    k: tuple[Array, ...]  # per layer [B, K, S, h]
    v: tuple[Array, ...]
    length: Array  # [B] int32, tokens in each row
    prev_embedding: Array  # [B, D], the last token's embedding before smearing


class Context(NamedTuple):
    """What all layers of one forward pass share."""

    config: GPTConfig
    compute: Compute
    tokens: Array  # [B, T] int32
    positions: Array  # [B, T] int32
    rotary: tuple[Array, Array]  # cosines and sines [B, T, 1, h]
    x0: Array  # [B, T, D], the input of the first layer
    fresh: bool  # the cache was empty: new tokens attend only to one another


def forward(
    params: Params,
    tokens: Array,
    config: GPTConfig,
    compute: Compute = REFERENCE,
    *,
    cache: KVCache | None = None,
    valid: Array | None = None,
    fresh: bool = False,
) -> tuple[Array, Any]:
    """(final hidden states [B, T, D] before the unembedding, the new `KVCache` or None).

    Args:
      params: the weights of the layers are stacked, [L, ...], or tuples of L arrays.
      tokens: [B, T] int32.
      cache: None: tokens start at position 0. Otherwise row b's tokens take positions
        `cache.length[b]` onward and attend to all before them. The returned cache has
        `length + valid`.
      valid: [B], number of real tokens per row (default T). Padding to their right is masked
        and later overwritten; 0 leaves a row unchanged.
      fresh: the cache is empty and has room for all T: the tokens attend only to one another, which
        halves the work.
    """
    batch, length = tokens.shape
    start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
    positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)
    rotary = rotary_tables(positions, config.head_dim, config.rotary_base, config.rotary_dtype)

    embedding = rms_norm(lookup(compute.gathered("wte", params["wte"]), tokens, compute.dtype))
    x = _smear(params, embedding, cache) if config.smear else embedding
    context = Context(config, compute, tokens, positions, rotary, x, fresh)
    x, middle, new_kv = _run_layers(params, x, cache, context)
    if config.backout:
        x = x - params["backout_lambda"].astype(compute.dtype) * middle
    hidden = rms_norm(x)
    if cache is None:
        return hidden, None

    valid = jnp.full(batch, length, jnp.int32) if valid is None else valid
    last = jnp.take_along_axis(embedding, jnp.maximum(valid - 1, 0)[:, None, None], axis=1)[:, 0]
    last = last.astype(cache.prev_embedding.dtype)
    prev = jnp.where((valid > 0)[:, None], last, cache.prev_embedding)
    new_k, new_v = zip(*new_kv)
    return hidden, KVCache(new_k, new_v, cache.length + valid, prev)


def _smear(params: Params, embedding: Array, cache: KVCache | None) -> Array:
    """Add a gated share of the previous token's embedding to each but the first token."""
    if cache is None:
        first = jnp.zeros_like(embedding[:, :1])
    else:
        first = jnp.where((cache.length > 0)[:, None], cache.prev_embedding, 0)[:, None]
        first = first.astype(embedding.dtype)
    previous = jnp.concatenate([first, embedding[:, :-1]], axis=1)
    gate = jax.nn.sigmoid(linear(embedding[..., :SMEAR_GATE_CHANNELS], params["smear_gate"]))
    return embedding + params["smear_lambda"].astype(embedding.dtype) * gate * previous


def _layer(
    x: Array, weights: Layer, kv: KV | None, window: int | None, context: Context
) -> tuple[Array, KV | None]:
    weights = {name: context.compute.gathered(name, weight) for name, weight in weights.items()}
    if context.config.lambdas:
        x = weights["resid_lambdas"] * x + weights["x0_lambdas"] * context.x0
    with jax.named_scope("attention"):
        out, kv = _attention(rms_norm(x), weights, kv, window, context)
        x = x + out
    with jax.named_scope("mlp"):
        matrices = weights["mlp_fc"], weights["mlp_proj"]
        return x + mlp(rms_norm(x), *matrices, context.compute.precision), kv


def _attention(
    x: Array, weights: Layer, kv: KV | None, window: int | None, context: Context
) -> tuple[Array, KV | None]:
    config, compute = context.config, context.compute
    matmul = functools.partial(linear, precision=compute.precision)
    q, k, v = (
        matmul(x, weights[name].reshape(x.shape[-1], -1, config.head_dim))
        for name in ("c_q", "c_k", "c_v")
    )
    if "value_embeds" in weights:
        gate = 3.0 * jax.nn.sigmoid(linear(x[..., :VE_GATE_CHANNELS], weights["ve_gate"]))
        value_embedding = lookup(weights["value_embeds"], context.tokens, x.dtype)
        v = v + gate[..., None] * value_embedding.reshape(v.shape)
    q, k = (rotary_norm(heads, *context.rotary, config.qk_scale) for heads in (q, k))
    if kv is not None:
        kv = (_write(kv[0], k, context), _write(kv[1], v, context))
    if kv is None or context.fresh:
        out = self_attention(q, k, v, window=window, compute=compute)
    else:
        out = cached_attention(q, *kv, context.positions, window=window)
    return matmul(out, weights["c_proj"].reshape(*out.shape[2:], -1), axes=2), kv


def _write(cache: Array, new: Array, context: Context) -> Array:
    """Write new keys or values [B, T, K, h] at their positions of a layer's cache [B, K, S, h]."""
    new, positions = new.astype(cache.dtype), context.positions
    rows = jnp.arange(new.shape[0])[:, None]
    if context.fresh:
        return jax.lax.dynamic_update_slice(cache, new.transpose(0, 2, 1, 3), (0, 0, 0, 0))
    if positions.shape[1] == 1:
        # Indexed by head as well. With one index, a CPU makes slice updates and copies the cache
        # four times; a TPU, which needs whole tokens contiguous, copies the cache to another
        # layout, padded.
        heads = jnp.arange(new.shape[2])
        return cache.at[rows[..., None], heads, positions[..., None]].set(new, mode="drop")
    return cache.at[rows, :, positions].set(new, mode="drop")


def layer_groups(config: GPTConfig, *, scan: bool, keep_few: bool) -> tuple[int, int]:
    """(layers per group, number of groups that run as one loop, from the first layer).

    `keep_few`: groups have about sqrt(L) layers, and only their inputs are saved (Chen et al.,
    2016).
    """
    layers, few = config.n_layer, math.isqrt(config.n_layer - 1) + 1
    if not scan:
        return (few if keep_few else layers), 0
    kinds = [(window, i in config.value_embed_layers) for i, window in enumerate(config.windows)]

    def equal_groups(size: int) -> int:
        return next(
            n for n in range(1, layers + 1) if kinds[n * size : (n + 1) * size] != kinds[:size]
        )

    # The size that gives the shortest program.
    size = min(range(1, layers + 1), key=lambda size: size + layers - size * equal_groups(size))
    if keep_few:
        size *= max(1, few // size)
    count = equal_groups(size)
    return size, count if count > 1 else 0


def _run_layers(
    params: Params, x: Array, cache: KVCache | None, context: Context
) -> tuple[Array, Array, list[KV | None]]:
    """The output of the last layer, the output of the middle one, and all keys and values."""
    config, compute = context.config, context.compute
    size, count = layer_groups(
        config, scan=compute.scan and cache is None, keep_few=compute.remat == "full"
    )
    stacks = _layer_stacks(params, context)
    middle, written, looped = x, [], size * count  # the first `looped` layers run as a loop
    if looped:
        x, middle = _loop_over_groups(stacks, x, (size, count), context)
    layers = _split_layers(stacks, config, range(config.n_layer)) if looped < config.n_layer else []
    run = _group_runner(context, static=(3, 4))
    for first in range(looped, config.n_layer, size):
        chosen = slice(first, first + size)
        kv = None if cache is None else [*zip(cache.k[chosen], cache.v[chosen])]
        x, middle, new = run(x, middle, layers[chosen], first, config.windows[chosen], kv)
        written += new
    return x, middle, written


def _loop_over_groups(
    stacks: Stacks, x: Array, groups: tuple[int, int], context: Context
) -> tuple[Array, Array]:
    """(last output, middle output) of the first size * count layers, by `lax.scan`, cacheless."""
    (size, count), config = groups, context.config
    run = _group_runner(context, static=(4,))

    def body(
        carry: tuple[Array, Array], inputs: tuple[Array, dict]
    ) -> tuple[tuple[Array, Array], None]:
        layers = _split_layers(inputs[1], config, range(size))
        return run(*carry, layers, inputs[0], config.windows[:size], None)[:2], None

    def grouped(stack: Array | tuple[Array, ...]) -> Array:
        # Weights of every other layer have half the entries; groups are even then.
        stack = jnp.stack(stack) if isinstance(stack, tuple) else stack
        used = stack[: len(stack) * size * count // config.n_layer]
        return used.reshape(count, -1, *used.shape[1:])

    inputs = (
        jnp.arange(0, size * count, size),
        {name: grouped(stack) for name, stack in stacks.items()},
    )
    return jax.lax.scan(body, (x, x), inputs)[0]


def _group_runner(context: Context, static: tuple[int, ...]) -> Callable[..., tuple]:
    """`_run_group` with this context; `static`: positions of its static arguments."""
    run = functools.partial(_run_group, context=context)
    return jax.checkpoint(run, static_argnums=static) if context.compute.remat == "full" else run


def _run_group(
    x: Array,
    middle: Array,
    layers: Sequence[Layer],
    first: int | Array,
    windows: tuple[int | None, ...],
    kv: Sequence[KV] | None,
    *,
    context: Context,
) -> tuple[Array, Array, list[KV | None]]:
    """Run `layers`, of which the first has number `first`, traced inside a loop."""
    config, remat = context.config, context.compute.remat
    looped = not isinstance(first, int)
    run_layer: Callable = functools.partial(_layer, context=context)
    if remat == "minimal":
        # In a loop, XLA cannot merge the forward pass with its recomputation, so the CSE barriers
        # are unnecessary; without them XLA fuses the loads. Other modes need them to save memory.
        run_layer = jax.checkpoint(
            run_layer, static_argnums=3, policy=SAVE_MATMULS, prevent_cse=not looped
        )
    elif remat != "none":
        run_layer = jax.checkpoint(run_layer, static_argnums=3)
    written, at = [], config.n_layer // 2
    for i, (layer, window) in enumerate(zip(layers, windows, strict=True)):
        x, new = run_layer(x, layer, None if kv is None else kv[i], window)
        written.append(new)
        if config.backout and looped and i == at % len(layers):
            middle = jnp.where(first + i == at, x, middle)
        elif config.backout and not looped and first + i == at:
            middle = x
    return x, middle, written


def _layer_stacks(params: Params, context: Context) -> Stacks:
    """The per-layer weights by name, in the compute dtype."""
    stacks: Stacks = {}
    for name, (path, _) in layer_weights(context.config).items():
        stack: Any = params
        for key in path:
            stack = stack[key]
        if name != "value_embeds":  # a table: only the rows looked up are cast
            stack = jax.tree.map(lambda weight: weight.astype(context.compute.dtype), stack)
        stacks[name] = stack
    return stacks


def _split_layers(stacks: Stacks, config: GPTConfig, layers: range) -> list[Layer]:
    """The weights of each layer.

    The transpose of `lax.split` is one concatenation; that of indexing would pad L times.
    """
    pieces = {
        name: iter(
            stack
            if isinstance(stack, tuple)
            else [piece[0] for piece in jax.lax.split(stack, (1,) * len(stack))]
        )
        for name, stack in stacks.items()
    }
    owners = {name: owner for name, (_, owner) in layer_weights(config).items()}
    return [
        {name: next(weights) for name, weights in pieces.items() if i in owners[name]}
        for i in layers
    ]


def unembed(params: Params, hidden: Array, *, config: GPTConfig) -> Array:
    """Softcapped logits [..., V] in float32 of hidden states [..., D]."""
    weight = params["lm_head"][:, : config.vocab_size].astype(hidden.dtype)
    return softcap(jnp.dot(hidden, weight, preferred_element_type=jnp.float32), config=config)


def softcap(logits: Array, *, config: GPTConfig) -> Array:
    """Logits bounded to (-softcap, softcap) by a tanh (Gemma 2, 2024), in the same order."""
    return config.softcap * jnp.tanh(logits / config.softcap)


def init_cache(config: GPTConfig, batch: int, max_len: int, dtype: Any = jnp.float32) -> KVCache:
    """An empty cache for `batch` rows of at most `max_len` tokens."""
    shape = (batch, config.n_kv_head, max_len, config.head_dim)
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layer)) for _ in "kv")
    return KVCache(k, v, jnp.zeros(batch, jnp.int32), jnp.zeros((batch, config.n_embd), dtype))

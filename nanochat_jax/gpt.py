"""The model: one forward pass for training, scoring, prefill and decoding.

`GPT` is a Flax NNX module, used to declare the parameters and the computation. Everything outside this file works with
`params`, the plain nested dict that `nnx.split` makes of it once, and with the pure functions at the end.

Letters: B batch, T new tokens, S cache length, D width, H query heads, K key/value heads, h head width, L layers, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from nanochat_jax.attention import cached_attention, causal_attention
from nanochat_jax.config import SMEAR_GATE_CHANNELS, VE_GATE_CHANNELS, GPTConfig
from nanochat_jax.kernels import KEEP_PRODUCTS
from nanochat_jax.layers import linear, mlp, rms_norm, rotary_norm, rotary_tables

Params = dict[str, Any]
REMAT = ("none", "elementwise", "block", "full")  # what of the activations is recomputed in the backward pass

# Logical axes of each parameter; sharding.py maps them to axes of the mesh.
LOGICAL_AXES: dict[str, Any] = {
    "wte": (None, "embed"),
    "lm_head": ("embed", "vocab"),
    "value_embeds": ("layers", "rows", "kv_heads"),
    "ve_gate": ("layers", None, None),
    "blocks": {
        "c_q": ("layers", "embed", "heads"),
        "c_k": ("layers", "embed", "kv_heads"),
        "c_v": ("layers", "embed", "kv_heads"),
        "c_proj": ("layers", "heads", "embed"),
        "mlp_fc": ("layers", "embed", "mlp"),
        "mlp_proj": ("layers", "mlp", "embed"),
    },
    "resid_lambdas": ("layers",),
    "x0_lambdas": ("layers",),
    "smear_gate": (None, None),
    "smear_lambda": (None,),
    "backout_lambda": (None,),
}


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, one row per sequence; rows may be at different positions."""

    k: tuple[Array, ...]  # per layer [B, K, S, h]
    v: tuple[Array, ...]
    length: Array  # [B] int32, tokens in each row
    prev_embedding: Array  # [B, D], the last token's embedding before smearing


class Blocks(nnx.Module):
    """The matrices of all layers, equal ones stacked on a leading axis: (L, in, out)."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs) -> None:
        depth, width = config.n_layer, config.n_embd
        heads, kv_heads = config.n_head * config.head_dim, config.n_kv_head * config.head_dim

        def matrix(fan_in: int, fan_out: int, gain: float = 1.0) -> nnx.Param:
            shape = (depth, fan_in, fan_out)
            if config.arch == "classic":
                std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
                return nnx.Param(std * jax.random.normal(rngs.params(), shape))
            bound = gain * math.sqrt(3.0 / width)
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.c_q = matrix(width, heads)
        self.c_k = matrix(width, kv_heads)
        self.c_v = matrix(width, kv_heads)
        self.c_proj = nnx.Param(jnp.zeros((depth, heads, width)))
        self.mlp_fc = matrix(width, 4 * width, gain=0.4)
        self.mlp_proj = nnx.Param(jnp.zeros((depth, 4 * width, width)))


class GPT(nnx.Module):
    """Parameters with upstream's initial distributions, and the forward pass of both eras."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        vocab, width, depth = config.padded_vocab_size, config.n_embd, config.n_layer
        classic = config.arch == "classic"
        self.wte = nnx.Param((1.0 if classic else 0.8) * jax.random.normal(rngs.params(), (vocab, width)))
        # A zero unembedding makes the initial loss of the classic model exactly ln V.
        self.lm_head = nnx.Param((0.0 if classic else 0.001) * jax.random.normal(rngs.params(), (width, vocab)))
        self.blocks = Blocks(config, rngs)
        if num_ve := len(config.value_embed_layers):
            bound = math.sqrt(3.0 / width)
            shape = (num_ve, vocab, config.n_kv_head * config.head_dim)
            self.value_embeds = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
            self.ve_gate = nnx.Param(
                jax.random.uniform(rngs.params(), (num_ve, VE_GATE_CHANNELS, config.n_kv_head), maxval=0.02)
            )
        if config.lambdas:
            fraction = jnp.arange(depth) / max(depth - 1, 1)
            self.resid_lambdas = nnx.Param(1.15 - 0.10 * fraction)
            self.x0_lambdas = nnx.Param(0.20 - 0.15 * fraction)
        if config.smear:
            self.smear_gate = nnx.Param(jax.random.uniform(rngs.params(), (SMEAR_GATE_CHANNELS, 1), maxval=0.02))
            self.smear_lambda = nnx.Param(jnp.zeros(1))
        if config.backout:
            self.backout_lambda = nnx.Param(jnp.full(1, 0.2))

    def __call__(self, tokens: Array, cache: KVCache | None, valid: Array | None, fresh: bool, dtype: Any, remat: str,
                 scan: bool, attend: Callable, gather: Callable | None) -> tuple[Array, KVCache | None]:
        config = self.config
        batch, length = tokens.shape
        start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
        positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)
        rotary = rotary_tables(positions, config.head_dim, config.rotary_base, config.rotary_dtype)

        gather = gather or (lambda name, weight: weight)
        embedding = rms_norm(gather("wte", self.wte[...])[tokens].astype(dtype))
        x = self._smear(embedding, cache) if config.smear else embedding
        x0 = x

        def block(x: Array, layer: dict[str, Array], cache: tuple[Array, Array] | None, window: int | None
                  ) -> tuple[Array, tuple[Array, Array] | None]:
            layer = {name: gather(name, weight) for name, weight in layer.items()}
            if config.lambdas:
                x = layer["resid_lambdas"] * x + layer["x0_lambdas"] * x0
            return self._block(x, layer, tokens, rotary, positions, cache, window, fresh, attend)

        kept = KEEP_PRODUCTS if remat == "elementwise" else None

        def run(x: Array, backout: Array, layers: list[dict[str, Array]], first: int | Array, windows: tuple[int | None, ...]
                ) -> tuple[Array, Array, list]:
            """The layers from `first` on, which is traced inside of a scan."""
            written = []
            # Loops keep XLA from merging a block's two passes; the barriers that else do keep it from fusing what it reads.
            # Where all of a block is computed again, they save memory.
            apart = remat != "elementwise" or not isinstance(first, Array)
            one = block if remat == "none" else jax.checkpoint(block, static_argnums=3, policy=kept, prevent_cse=apart)
            for i, (layer, window) in enumerate(zip(layers, windows, strict=True)):
                x, kv = one(x, layer, None if cache is None else (cache.k[first + i], cache.v[first + i]), window)
                written.append(kv)
                if config.backout and (config.n_layer // 2 - i) % size == 0:  # only there can the middle be
                    middle = first + i == config.n_layer // 2
                    backout = jnp.where(middle, x, backout) if isinstance(middle, Array) else x if middle else backout
            return x, backout, written

        if remat == "full":
            run = jax.checkpoint(run, static_argnums=4)
        stacks, backout, written = self._stacks(dtype), x, []
        size, count = layer_groups(config, scan=scan and cache is None, keep_few=remat == "full")
        if scanned := size * count:
            def group(carry: tuple[Array, Array], inputs: tuple[Array, dict]) -> tuple[tuple[Array, Array], None]:
                return run(*carry, self._unstack(inputs[1], 0, size), inputs[0], config.windows[:size])[:2], None

            grouped = {name: stack[: len(stack) * scanned // config.n_layer].reshape(count, -1, *stack.shape[1:])
                       for name, stack in stacks.items()}  # of every other layer: half of them, groups being even
            (x, backout), _ = jax.lax.scan(group, (x, backout), (jnp.arange(0, scanned, size), grouped))
        layers = self._unstack(stacks, 0, config.n_layer) if scanned < config.n_layer else []
        for first in range(scanned, config.n_layer, size):
            x, backout, kv = run(x, backout, layers[first : first + size], first, config.windows[first : first + size])
            written += kv
        if config.backout:
            x = x - self.backout_lambda[...].astype(dtype) * backout
        hidden = rms_norm(x)
        if cache is None:
            return hidden, None

        valid = jnp.full(batch, length, jnp.int32) if valid is None else valid
        last = jnp.take_along_axis(embedding, jnp.maximum(valid - 1, 0)[:, None, None], axis=1)[:, 0]
        prev = jnp.where((valid > 0)[:, None], last.astype(cache.prev_embedding.dtype), cache.prev_embedding)
        new_k, new_v = zip(*written)
        return hidden, KVCache(new_k, new_v, cache.length + valid, prev)

    def _stacks(self, dtype: Any) -> dict[str, Array]:
        """What each layer has of its own, by name; a stack has the layers in order, those of value embeddings every other."""
        stacks = {name: getattr(self.blocks, name)[...].astype(dtype) for name in LOGICAL_AXES["blocks"]}
        if self.config.lambdas:
            stacks |= {name: getattr(self, name)[...].astype(dtype) for name in ("resid_lambdas", "x0_lambdas")}
        if self.config.value_embed_layers:
            stacks |= {name: getattr(self, name)[...] for name in ("value_embeds", "ve_gate")}
        return stacks

    def _unstack(self, stacks: dict[str, Array], first: int, count: int) -> list[dict[str, Array]]:
        """A dict for each layer from `first` on. `lax.split` transposes to one concatenation; indexing would pad L times."""
        with_ve = self.config.value_embed_layers
        pieces = {name: iter(jax.lax.split(stack, (1,) * len(stack))) for name, stack in stacks.items()}
        return [{name: next(each)[0] for name, each in pieces.items() if i in with_ve
                 or name not in ("value_embeds", "ve_gate")}
                for i in range(first, first + count)]

    def _smear(self, embedding: Array, cache: KVCache | None) -> Array:
        """Mix a gated share of the previous token's embedding into each; the first position has no previous one."""
        if cache is None:
            first = jnp.zeros_like(embedding[:, :1])
        else:
            first = jnp.where((cache.length > 0)[:, None], cache.prev_embedding, 0)[:, None].astype(embedding.dtype)
        previous = jnp.concatenate([first, embedding[:, :-1]], axis=1)
        gate = jax.nn.sigmoid(linear(embedding[..., :SMEAR_GATE_CHANNELS], self.smear_gate[...]))
        return embedding + self.smear_lambda[...].astype(embedding.dtype) * gate * previous

    def _block(self, x: Array, layer: dict[str, Array], tokens: Array, rotary: tuple[Array, Array], positions: Array,
               cache: tuple[Array, Array] | None, window: int | None, fresh: bool, attend: Callable
               ) -> tuple[Array, tuple[Array, Array] | None]:
        with jax.named_scope("attention"):
            out, cache = self._attention(rms_norm(x), layer, tokens, rotary, positions, cache, window, fresh, attend)
            x = x + out
        with jax.named_scope("mlp"):
            return x + mlp(rms_norm(x), layer["mlp_fc"], layer["mlp_proj"]), cache

    def _attention(self, x, layer, tokens, rotary, positions, cache, window, fresh, attend):
        config = self.config
        q, k, v = (linear(x, layer[name].reshape(x.shape[-1], -1, config.head_dim)) for name in ("c_q", "c_k", "c_v"))
        if "value_embeds" in layer:
            gate = 3.0 * jax.nn.sigmoid(linear(x[..., :VE_GATE_CHANNELS], layer["ve_gate"]))
            v = v + gate[..., None] * layer["value_embeds"][tokens].astype(x.dtype).reshape(v.shape)
        q, k = (rotary_norm(each, *rotary, config.qk_scale) for each in (q, k))
        if cache is not None:
            cache = tuple(_write(old, new, positions, fresh) for old, new in zip(cache, (k, v)))
        out = (attend(q, k, v, window=window) if cache is None or fresh else
               cached_attention(q, *cache, positions, window=window))
        return linear(out, layer["c_proj"].reshape(*out.shape[2:], -1), axes=2), cache


def _write(cache: Array, new: Array, positions: Array, fresh: bool) -> Array:
    """Put new [B, T, K, h] at positions [B, T] of a layer's cache [B, K, S, h]; positions past the end are dropped."""
    new, rows = new.astype(cache.dtype), jnp.arange(new.shape[0])[:, None]
    if fresh:
        return jax.lax.dynamic_update_slice(cache, new.transpose(0, 2, 1, 3), (0, 0, 0, 0))
    if positions.shape[1] == 1:  # written by head: of one index a CPU makes slice updates and copies the cache four times,
        # and for whole tokens a TPU wants these in a piece and lays out the cache anew, padded
        return cache.at[rows[..., None], jnp.arange(new.shape[2]), positions[..., None]].set(new, mode="drop")
    return cache.at[rows, :, positions].set(new, mode="drop")


def layer_groups(config: GPTConfig, *, scan: bool, keep_few: bool) -> tuple[int, int]:
    """(size, count): how many layers form a group, and how many groups from the first on are equal and run as one loop.

    `keep_few`: groups of about the square root of L layers, of which only the inputs are kept (Chen et al., 2016).
    """
    layers, few = config.n_layer, math.isqrt(config.n_layer - 1) + 1
    if not scan:
        return (few if keep_few else layers), 0
    kinds = [(window, i in config.value_embed_layers) for i, window in enumerate(config.windows)]

    def count(size: int) -> int:
        return next(n for n in range(1, layers + 1) if kinds[n * size : (n + 1) * size] != kinds[:size])

    size = min(range(1, layers + 1), key=lambda size: size + layers - size * count(size))  # the shortest program
    if keep_few:
        size *= max(1, few // size)
    return size, count(size) if count(size) > 1 else 0


@functools.lru_cache(maxsize=16)
def _abstract(config: GPTConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))


def init_params(config: GPTConfig, key: Array) -> Params:
    """Initial parameters, float32, from a PRNG key."""
    return nnx.to_pure_dict(nnx.split(GPT(config, rngs=nnx.Rngs(params=key)))[1])


def abstract_params(config: GPTConfig) -> Params:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def logical_axes(config: GPTConfig) -> Params:
    """Logical axis names of each parameter that this config has, a tree like the parameters'."""
    return jax.tree.map_with_path(
        lambda path, _: functools.reduce(lambda axes, key: axes[key.key], path, LOGICAL_AXES), abstract_params(config)
    )


@overload
def forward(params: Params, tokens: Array, *, config: GPTConfig, compute_dtype: Any = ..., cache: KVCache,
            valid: Array | None = ..., fresh: bool = ...) -> tuple[Array, KVCache]: ...
@overload
def forward(params: Params, tokens: Array, *, config: GPTConfig, compute_dtype: Any = ..., cache: None = ..., remat: str = ...,
            scan: bool = ..., attention: Callable = ..., gather: Callable | None = ...) -> tuple[Array, None]: ...
def forward(params: Params, tokens: Array, *, config: GPTConfig, compute_dtype: Any = jnp.float32,
            cache: KVCache | None = None, valid: Array | None = None, fresh: bool = False, remat: str = "none",
            scan: bool = False, attention: Callable = causal_attention, gather: Callable | None = None
            ) -> tuple[Array, KVCache | None]:
    """Final hidden states [B, T, D] of tokens [B, T] int32, before the unembedding.

    Without a cache: causal, from position 0. With one: row b's tokens take positions `cache.length[b]` onward and see all
    before them; the returned cache has `length + valid`. `valid` [B] (default T) is how many tokens of a row count:
    padding to its right is masked and later overwritten, and 0 leaves a row as it is. `fresh` says that the cache is empty
    and has room for all T: the tokens see one another alone, at half the work. The backward pass recomputes what `remat`
    says: nothing ("none"), all but attention and products, but for the MLP's hidden layer ("elementwise"), what is inside of
    blocks ("block"), or also most blocks' inputs ("full").
    `scan` makes a loop of equal groups of layers, so that programs for big models compile fast (not with a cache).
    `attention` takes the place of the reference where no cache is read (kernels.py). `gather(name, weight)` makes a weight
    whole right before it is used, where devices hold parts (sharding.gather_over_data).
    """
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r} is none of {', '.join(REMAT)}")
    graphdef, state = _abstract(config)
    state = jax.tree.map(lambda leaf: leaf, state)  # replace_by_pure_dict works in place
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)(tokens, cache, valid, fresh, compute_dtype, remat, scan, attention, gather)


def unembed(params: Params, hidden: Array, *, config: GPTConfig) -> Array:
    """Softcapped logits [..., V] in float32 of hidden states [..., D]."""
    weight = params["lm_head"][:, : config.vocab_size].astype(hidden.dtype)
    return softcap(jnp.dot(hidden, weight, preferred_element_type=jnp.float32), config=config)


def softcap(logits: Array, *, config: GPTConfig) -> Array:
    """Logits bounded to (-softcap, softcap) by a tanh (Gemma 2, 2024), in order."""
    return config.softcap * jnp.tanh(logits / config.softcap)


def init_cache(config: GPTConfig, batch: int, max_len: int, dtype: Any = jnp.float32) -> KVCache:
    """An empty cache for `batch` rows of at most `max_len` tokens."""
    shape = (batch, config.n_kv_head, max_len, config.head_dim)
    layers = range(config.n_layer)
    return KVCache(tuple(jnp.zeros(shape, dtype) for _ in layers), tuple(jnp.zeros(shape, dtype) for _ in layers),
                   jnp.zeros(batch, jnp.int32), jnp.zeros((batch, config.n_embd), dtype))

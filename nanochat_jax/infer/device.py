"""The engine's device programs: prefill, insertion into slots, growth of the cache, and decoding several steps.

All take parameters, as `split_layers` gives them, and cache as arguments; `Program` is the static rest. Shapes come
from buckets (engine.py), so the number of compilations is bounded. B slots, K steps of a dispatch, N prompts of a
prefill, T their padded length.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanochat_jax.config import GPTConfig
from nanochat_jax.gpt import KVCache, Params, forward, init_cache, unembed
from nanochat_jax.infer.sampling import SamplingParams, sample


@dataclass(frozen=True)
class Program:
    """What the programs are compiled for, besides shapes."""

    config: GPTConfig
    dtype: jnp.dtype
    max_rows: int  # most prompts of a prefill
    terminal: tuple[int, ...]  # token ids that end a sequence
    pause: int  # token id after which the host must decide how a sequence goes on
    mesh: Mesh | None


class Dispatch(NamedTuple):
    """What the host says about each slot for the next K steps."""

    token: Array  # [B] int32, the newest token, not yet in the cache
    active: Array  # [B] bool
    remaining: Array  # [B] int32, tokens the slot may still emit
    forced: Array  # [B, K] int32, tokens to emit in place of drawn ones
    num_forced: Array  # [B] int32
    sampling: SamplingParams


def split_layers(params: Params) -> Params:
    """The parameters with each stack of the blocks, (L, in, out), as a tuple of its matrices.

    Decoding from the stacks would copy every matrix out of its stack at every step: half as fast again on a CPU.
    """

    @jax.jit
    def split(stack: Array) -> tuple[Array, ...]:
        return tuple(layer[0] for layer in lax.split(stack, (1,) * len(stack)))

    return params | {"blocks": {name: split(stack) for name, stack in params["blocks"].items()}}


def _stack_layers(params: Params) -> Params:
    """What the forward pass takes. It splits the stacks again, and the compiler drops the pair."""
    return params | {"blocks": {name: jnp.stack(layers) for name, layers in params["blocks"].items()}}


def cache_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Rows over the data axis, key/value heads over the model axis, where the sizes divide.

    `shape` is [B, K, S, h] of a layer's keys, or [B, ...] of the rest.
    """
    rows = "data" if shape[0] % mesh.shape["data"] == 0 else None
    heads = "model" if len(shape) == 4 and shape[1] % mesh.shape["model"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(rows, heads) if heads else PartitionSpec(rows))


def _place(cache: KVCache, mesh: Mesh | None) -> KVCache:
    if mesh is None:
        return cache
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, cache_sharding(x.shape, mesh)), cache)


def _replicate(x: Array, mesh: Mesh | None) -> Array:
    """For what the host reads: every process of a multi-host run holds all of it."""
    return x if mesh is None else lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnames=("rows", "length", "program"))
def new_cache(*, rows: int, length: int, program: Program) -> KVCache:
    return _place(init_cache(program.config, rows, length, program.dtype), program.mesh)


@functools.partial(jax.jit, static_argnames=("length", "program"))
def grow(cache: KVCache, *, length: int, program: Program) -> KVCache:
    """The same cache with room for `length` positions a row."""

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))

    return _place(cache._replace(k=tuple(map(pad, cache.k)), v=tuple(map(pad, cache.v))), program.mesh)


@functools.partial(jax.jit, static_argnames="program")
def prefill(params: Params, tokens: Array, lengths: Array, *, program: Program) -> tuple[KVCache, Array]:
    """Cache of N prompts, and the logits [max_rows, V] after each; the same shape for any N compiles their reader once.

    tokens [N, T] int32, padded on the right; lengths [N] int32, at least 1.
    """
    config, dtype = program.config, program.dtype
    cache = _place(init_cache(config, *tokens.shape, dtype), program.mesh)
    hidden, cache = forward(
        _stack_layers(params), tokens, config=config, compute_dtype=dtype, cache=cache, valid=lengths
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = unembed(params, last, config=config)
    logits = jnp.pad(logits, ((0, program.max_rows - logits.shape[0]), (0, 0)))
    return _place(cache, program.mesh), _replicate(logits, program.mesh)


@functools.partial(jax.jit, static_argnames="program")
def sample_first(logits: Array, source: Array, position: Array, sampling: SamplingParams, *, program: Program) -> Array:
    """First tokens [B] of slots, each from its row, source [B], of a prefill's logits."""
    return _replicate(sample(logits[source], sampling, position), program.mesh)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="program")
def insert(cache: KVCache, prompts: KVCache, row: Array, slot: Array, *, program: Program) -> KVCache:
    """Put one row of a prefill into a slot. One at a time, so that it compiles once for any number of slots filled."""

    def put(x: Array, new: Array) -> Array:
        new = lax.dynamic_slice_in_dim(new, row, 1)
        return lax.dynamic_update_slice(x, new, (slot,) + (0,) * (x.ndim - 1))

    return _place(jax.tree.map(put, cache, prompts), program.mesh)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="program")
def decode(params: Params, cache: KVCache, dispatch: Dispatch, *, program: Program) -> tuple[KVCache, Array]:
    """Advance every active slot by up to K tokens.

    A slot rests once it has emitted a terminal token, the pausing token or its last; the loop ends when all rest.
    Returns the cache and the emitted tokens [B, K], -1 where a slot rested.
    """
    config, steps = program.config, dispatch.forced.shape[1]
    stops = jnp.array((*program.terminal, program.pause), jnp.int32)

    def advance(state):
        step, cache, token, active, remaining, emitted = state
        valid = active.astype(jnp.int32)
        hidden, cache = forward(
            _stack_layers(params), token[:, None], config=config, compute_dtype=program.dtype, cache=cache, valid=valid
        )
        logits = unembed(params, hidden[:, 0], config=config)
        drawn = sample(logits, dispatch.sampling, cache.length)
        is_forced = step < dispatch.num_forced
        token = jnp.where(active, jnp.where(is_forced, dispatch.forced[:, step], drawn), token)
        emitted = emitted.at[:, step].set(jnp.where(active, token, -1))
        remaining = remaining - active
        halted = ~is_forced & jnp.any(token[:, None] == stops, axis=-1)
        return step + 1, _place(cache, program.mesh), token, active & ~halted & (remaining > 0), remaining, emitted

    def running(state):
        step, _, _, active, _, _ = state
        return (step < steps) & jnp.any(active)

    emitted = jnp.full((dispatch.token.shape[0], steps), -1, jnp.int32)
    state = (jnp.int32(0), cache, dispatch.token, dispatch.active, dispatch.remaining, emitted)
    _, cache, _, _, _, emitted = lax.while_loop(running, advance, state)
    return _place(cache, program.mesh), _replicate(emitted, program.mesh)

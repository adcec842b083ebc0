"""The engine's jitted functions: prefill, copy, resize and multi-step decode.

Parameters are in the form of `split_layers`. Sizes are padded (engine.py), which bounds the number
of compilations. Shapes: B slots, S positions per slot, R slots and K steps per dispatch, T padded
length of a prefill, L layers, G key/value heads, h head width.

The cache holds only keys and values; `DecodeInputs` carries the length of each slot.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanochat_jax.infer.request import Generation
from nanochat_jax.infer.sampling import SamplingParams, log_probability, noise_for, sample
from nanochat_jax.model.compute import Compute, device_of
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.fast import lookup
from nanochat_jax.model.gpt import KVCache, forward, init_cache, softcap
from nanochat_jax.model.layers import rms_norm
from nanochat_jax.model.rows import Rows, as_table
from nanochat_jax.model.weights import Params


@dataclass(frozen=True)
class DecodeConfig:
    """Static arguments of the jitted functions."""

    config: GPTConfig
    compute: Compute
    python_end: int  # token id that ends a tool call, and so a slot's dispatch


Index = Array | np.ndarray  # [R] int32


class Slots(NamedTuple):
    """Keys and values of all slots, per layer [B, G, S, h]."""

    k: tuple[Array, ...]
    v: tuple[Array, ...]

    @property
    def length(self) -> int:
        """S: positions of each slot."""
        return self.k[0].shape[2]


class DecodeInputs(NamedTuple):
    """Inputs of up to K decode steps for R slots."""

    rows: dict[str, Array | np.ndarray]  # by the field names of `new_rows`
    steps: Array | np.integer  # [] int32, at most K

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(*(self.rows[name] for name in SamplingParams._fields))


def new_rows(count: int, *, length: int, steps: int, stops: int) -> np.ndarray:
    """Return a structured array of `count` inactive rows.

    `length` is the cache's length, which leaves a slot unchanged; `steps` is K; `stops` is the
    number of stop tokens per row.
    """
    fields: list[Any] = [
        ("slot", np.int32),  # ascending slot indices; all slots if R is B
        ("length", np.int32),  # positions filled; S or more leaves the slot unchanged
        ("previous", np.int32),  # the token before the newest
        ("token", np.int32),  # the newest token, not yet in the cache
        ("active", bool),
        ("remaining", np.int32),  # tokens the slot may still emit
        ("injected", np.int32, (steps,)),  # tokens to emit in place of drawn ones
        ("num_injected", np.int32),
        ("stop", np.int32, (stops,)),  # drawn tokens that end the sequence; padded with -1
        ("logprobs", bool),  # whether to compute them
        ("temperature", np.float32),  # and so on: see SamplingParams
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("seed", np.uint32, (2,)),
    ]
    rows = np.zeros(count, fields)
    rows["length"], rows["stop"], rows["top_p"] = length, -1, 1.0
    return rows


def fill_row(row: np.void, generation: Generation, vocab_size: int) -> None:
    """Fill one of `new_rows` with the next decode steps of a generation."""
    request = generation.request
    injected = list(generation.injected)[: len(row["injected"])]
    row["length"], row["active"] = generation.length, True
    row["previous"], row["token"] = generation.newest
    row["remaining"] = generation.max_tokens - len(generation.tokens)
    row["injected"][: len(injected)], row["num_injected"] = injected, len(injected)
    row["stop"][: len(generation.stop_ids)] = generation.stop_ids
    row["logprobs"] = request.logprobs
    row["temperature"], row["top_p"] = request.temperature, request.top_p
    row["top_k"] = min(request.top_k, vocab_size)
    row["seed"] = request.seed >> 32 & 0xFFFFFFFF, request.seed & 0xFFFFFFFF


def decode_inputs(rows: np.ndarray, steps: int) -> DecodeInputs:
    """Convert rows to `DecodeInputs` for `steps` steps."""
    columns: dict[str, Array | np.ndarray] = {
        name: np.ascontiguousarray(rows[name]) for name in rows.dtype.names or ()
    }
    return DecodeInputs(columns, np.int32(steps))


def greedy_inputs(count: int, *, length: int, steps: int) -> DecodeInputs:
    """Return inputs for benchmarks: `steps` greedy tokens for `count` sequences, no stop tokens."""
    rows = new_rows(count, length=length, steps=steps, stops=1)
    rows["slot"], rows["active"], rows["remaining"] = np.arange(count), True, steps
    return decode_inputs(rows, steps)


def split_layers(params: Params, *, config: GPTConfig, compute: Compute) -> Params:
    """Return the parameters in the layout that decodes fastest.

    Stacked block weights (L, in, out) and value embeddings become tuples with one array per layer:
    on CPUs and TPUs, every step would copy the stacks. `lm_head` becomes `Rows`. In bfloat16 on
    CPUs, so do the block weights, and tables take the form of `as_table`.
    """
    matrix: Callable[[Array], Any] = _unchanged
    table: Callable[[Array], Array] = _unchanged
    if device_of(compute.mesh).platform == "cpu" and compute.dtype == jnp.bfloat16:
        matrix, table = Rows.of, as_table
    blocks = {name: _split(stack, matrix) for name, stack in params["blocks"].items()}
    params = params | {"blocks": blocks, "wte": table(params["wte"])}
    if "value_embeds" in params:
        params["value_embeds"] = _split(params["value_embeds"], table)
    params["lm_head"] = _head(params["lm_head"], size=config.vocab_size)
    return params


def _unchanged(weight: Array) -> Array:
    return weight


@functools.partial(jax.jit, static_argnames="form")
def _split(stack: Array, form: Callable[[Array], Any]) -> tuple[Any, ...]:
    return tuple(form(layer[0]) for layer in lax.split(stack, (1,) * len(stack)))


@functools.partial(jax.jit, static_argnames="size")
def _head(head: Array, *, size: int) -> Rows:
    return Rows.of(head[:, :size])


def cache_sharding(rows: int, heads: int, mesh: Mesh) -> NamedSharding:
    """Return a sharding of rows over the data axis and of key/value heads over the model axis.

    An axis that does not divide evenly is replicated.
    """
    return NamedSharding(
        mesh,
        PartitionSpec(
            "data" if rows % mesh.shape["data"] == 0 else None,
            "model" if heads % mesh.shape["model"] == 0 else None,
        ),
    )


def _place(cache: Any, mesh: Mesh | None) -> Any:
    """Constrain the sharding of arrays [B, G, S, h]."""
    if mesh is None:
        return cache
    return jax.tree.map(
        lambda x: lax.with_sharding_constraint(x, cache_sharding(x.shape[0], x.shape[1], mesh)),
        cache,
    )


def _replicate(x: Array, mesh: Mesh | None) -> Array:
    """Replicate an array so that every process of a multi-host run can read it."""
    return (
        x if mesh is None else lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))
    )


@functools.partial(jax.jit, static_argnames=("rows", "length", "static"))
def new_slots(*, rows: int, length: int, static: DecodeConfig) -> Slots:
    cache = init_cache(static.config, rows, length, static.compute.cache_dtype)
    return _place(Slots(cache.k, cache.v), static.compute.mesh)


@functools.partial(jax.jit, static_argnames=("length", "static"))
def resize(slots: Slots, *, length: int, static: DecodeConfig) -> Slots:
    """Return the slots padded or truncated to `length` positions."""

    def fit(x: Array) -> Array:
        x = x[:, :, :length]
        return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))

    return _place(jax.tree.map(fit, slots), static.compute.mesh)


@functools.partial(jax.jit, donate_argnames="slots", static_argnames="static")
def copy(slots: Slots, source: Array, target: Array, *, static: DecodeConfig) -> Slots:
    """Copy the keys and values of slot `source` to slot `target`."""
    mesh = static.compute.mesh
    slot = jnp.arange(len(slots.k[0]))[:, None, None, None]

    def put(x: Array) -> Array:
        if mesh is None or mesh.shape["data"] == 1:
            row = lax.dynamic_slice_in_dim(x, source, 1)
            return lax.dynamic_update_slice(x, row, (target, 0, 0, 0))
        # Slicing a sharded axis would gather it; this moves one slot.
        row = jnp.where(slot == source, x, 0).sum(axis=0, keepdims=True)
        return jnp.where(slot == target, row, x)

    return _place(jax.tree.map(put, slots), mesh)


def _take(slots: Slots, index: Index) -> Slots:
    """Return the slots in `index` [R]."""
    if len(index) == len(slots.k[0]):
        return slots
    return jax.tree.map(
        lambda x: jnp.concatenate([lax.dynamic_slice_in_dim(x, slot, 1) for slot in index]), slots
    )


def _put(slots: Slots, some: Slots, index: Index, start: Index, *, size: int) -> Slots:
    """Return all slots; those in `index` get `size` positions from `start` [R] of `some`."""
    if len(index) == len(slots.k[0]):
        return some

    def put(x: Array, new: Array) -> Array:
        for row, slot in enumerate(index):
            at = (0, start[row], 0)
            window = lax.dynamic_slice(new[row], at, (x.shape[1], size, x.shape[3]))
            x = lax.dynamic_update_slice(x, window[None], (slot, *at))
        return x

    return jax.tree.map(put, slots, some)


class DecodeState(NamedTuple):
    """State between two decode steps."""

    step: Array  # []
    cache: KVCache
    token: Array  # [R]
    active: Array  # [R]
    remaining: Array  # [R]
    emitted: Array  # [R, K]
    logprobs: Array  # [R, K]


class PrefillInputs(NamedTuple):
    """Up to T prompt tokens for each of R slots."""

    slot: np.ndarray  # [R] int32, ascending slot indices; all slots if R is B
    start: np.ndarray  # [R] int32, positions filled; S or more leaves the slot unchanged
    previous: np.ndarray  # [R] int32, the token before the first
    tokens: np.ndarray  # [R, T] int32, padded on the right
    valid: np.ndarray  # [R] int32, number of tokens that are not padding


@functools.partial(jax.jit, donate_argnames="slots", static_argnames="static")
def prefill(params: Params, slots: Slots, inputs: PrefillInputs, *, static: DecodeConfig) -> Slots:
    """Append prompt tokens to slots. Padding is overwritten by what follows."""
    cache = _rows_of(params, slots, inputs.slot, inputs.start, inputs.previous, static)
    tokens, valid = jnp.asarray(inputs.tokens), jnp.asarray(inputs.valid)
    _, cache = forward(params, tokens, static.config, static.compute, cache=cache, valid=valid)
    new = Slots(cache.k, cache.v)
    slots = _put(slots, new, inputs.slot, inputs.start, size=inputs.tokens.shape[1])
    return _place(slots, static.compute.mesh)


def _rows_of(
    params: Params, slots: Slots, index: Index, length: Index, previous: Index, static: DecodeConfig
) -> KVCache:
    """Return the cache of the slots in `index` [R], filled to `length` [R]."""
    # Smearing mixes the normalized embedding of the previous token into the next.
    embedding = rms_norm(lookup(params["wte"], jnp.asarray(previous), static.compute.dtype))
    return KVCache(*_take(slots, index), jnp.asarray(length), embedding)


@functools.partial(jax.jit, donate_argnames="slots", static_argnames="static")
def decode(
    params: Params, slots: Slots, inputs: DecodeInputs, *, static: DecodeConfig
) -> tuple[Slots, Array, Array]:
    """Advance every active slot by up to `inputs.steps` tokens.

    A slot becomes inactive when it emits a stop token or `static.python_end` that was not injected,
    or has no tokens remaining. The loop ends when no slot is active. Returns the cache, the emitted
    tokens [R, K] (-1 if inactive) and their log-probabilities [R, K] (NaN if inactive or not
    requested). If R < B, the steps run on copies of the R slots and do not read the others.
    """
    mesh, rows = static.compute.mesh, inputs.rows
    # An active slot emits at every step, so its positions are consecutive.
    position = rows["length"] + 1 + jnp.arange(rows["injected"].shape[1])[:, None]
    noise = noise_for(inputs.sampling.seed, position, static.config.vocab_size)
    state = DecodeState(
        jnp.int32(0),
        _rows_of(params, slots, rows["slot"], rows["length"], rows["previous"], static),
        jnp.asarray(rows["token"]),
        jnp.asarray(rows["active"]),
        jnp.asarray(rows["remaining"]),
        jnp.full(rows["injected"].shape, -1, jnp.int32),
        jnp.full(rows["injected"].shape, jnp.nan, jnp.float32),
    )
    state = lax.while_loop(
        lambda state: (state.step < inputs.steps) & jnp.any(state.active),
        lambda state: _decode_step(params, state, inputs, noise[state.step], static),
        state,
    )
    new = Slots(state.cache.k, state.cache.v)
    size = rows["injected"].shape[1]
    slots = _put(slots, new, rows["slot"], rows["length"], size=size)
    return _place(slots, mesh), _replicate(state.emitted, mesh), _replicate(state.logprobs, mesh)


def _decode_step(
    params: Params, state: DecodeState, inputs: DecodeInputs, noise: Array, static: DecodeConfig
) -> DecodeState:
    """Feed the newest token of each row and emit the next. `noise` is from `noise_for`."""
    config, mesh, step, active = static.config, static.compute.mesh, state.step, state.active
    rows = inputs.rows
    cap = functools.partial(softcap, config=config)
    hidden, cache = forward(
        params,
        state.token[:, None],
        config,
        static.compute,
        cache=state.cache,
        valid=active.astype(jnp.int32),
    )
    logits = params["lm_head"].columns(hidden[:, 0])  # [V, R], before the softcap
    drawn = sample(logits, inputs.sampling, noise, cap)
    is_injected = step < rows["num_injected"]
    token = jnp.where(is_injected, rows["injected"][:, step], drawn)
    token = jnp.where(active, token, state.token)
    logprobs = log_probability(logits, token, active & rows["logprobs"], cap)
    remaining = state.remaining - active
    is_stop = jnp.any(token[:, None] == rows["stop"], axis=-1) | (token == static.python_end)
    return DecodeState(
        step + 1,
        cache._replace(k=_place(cache.k, mesh), v=_place(cache.v, mesh)),
        token,
        active & (is_injected | ~is_stop) & (remaining > 0),
        remaining,
        state.emitted.at[:, step].set(jnp.where(active, token, -1)),
        state.logprobs.at[:, step].set(logprobs),
    )

"""The negative log-likelihood of each token, for training, RL, bits per byte and scoring.

The [B, T, V] logits are never in memory at once. The logits of a chunk of positions are computed,
used for the loss and, if differentiated, for the gradients, then dropped. The softcap bounds the
logits to +-15, so the log-sum-exp needs no pass for the maximum.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.fast import matmul_transposed, transpose
from nanochat_jax.model.gpt import forward
from nanochat_jax.model.weights import Params

CHUNK_ELEMENTS = 2**25  # float32 logits alive at once, per device: 128 MiB


class Batch(NamedTuple):
    """Rows of tokens to predict, as NumPy or JAX arrays.

    Batches of a training step have a leading axis of micro-batches, [A, B, T].
    """

    inputs: Any  # [B, T] int32
    targets: Any  # [B, T] int32; negative: ignored
    weights: Any = None  # [B, T] float32, factor of each token's loss (not differentiated); None: 1


def token_nll(
    params: Params, batch: Batch, config: GPTConfig, compute: Compute
) -> tuple[Array, Array]:
    """(sum over tokens of weight * nll, nll [B, T]) in nats; nll is 0 where ignored.

    Only the sum has a gradient.
    """
    hidden, _ = forward(params, batch.inputs, config, compute)
    unembedding = params["lm_head"][:, : config.vocab_size].astype(compute.dtype)
    unembedding = compute.gathered("lm_head", unembedding)
    weights = jnp.ones(batch.targets.shape) if batch.weights is None else batch.weights
    chunk = chunk_length(batch.targets.shape, config.vocab_size, compute.num_shards)
    return cross_entropy(hidden, unembedding, batch.targets, weights, config.softcap, chunk)


def target_scores(
    params: Params, hidden: Array, targets: Array, config: GPTConfig, compute: Compute
) -> tuple[Array, Array]:
    """The nll [B, T] of each target, and whether it is the most likely token [B, T].

    Hidden states [B, T, D]; targets [B, T] int32; negative: nll 0 and False. Of equal logits the
    first counts as the most likely.
    """
    unembedding = params["lm_head"][:, : config.vocab_size].astype(hidden.dtype)
    chunk = chunk_length(targets.shape, config.vocab_size, compute.num_shards)

    def body(_: Any, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        nll, tanh, _ = _chunk_nll(inputs[0], unembedding, inputs[1], config.softcap)
        return None, (nll, first_argmax(tanh) == inputs[1])

    scores = jax.lax.scan(body, None, (_chunks(hidden, chunk, 0), _chunks(targets, chunk, -1)))[1]
    nll, is_best = (_unchunk(score, targets.shape[1]) for score in scores)
    return nll, is_best


def first_argmax(values: Array, axis: int = -1) -> Array:
    """Index of the first maximum of `values` along an axis; undefined if there is a NaN.

    Two plain reductions: XLA's argmax, which reduces values and indices together, is several times
    slower on a CPU.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, values.shape, axis % values.ndim)
    greatest = jnp.max(values, axis=axis, keepdims=True)
    return jnp.min(jnp.where(values == greatest, index, values.shape[axis]), axis=axis)


def chunk_length(shape: tuple[int, ...], vocab: int, num_shards: int = 1) -> int:
    """Positions per chunk of rows [B, T] within each device's logits budget."""
    batch, length = shape
    fewest = min(length, -(-batch * length * vocab // (CHUNK_ELEMENTS * num_shards)))
    count = next((n for n in range(fewest, min(2 * fewest, length) + 1) if length % n == 0), fewest)
    return -(-length // count)


def _chunks(x: Array, chunk: int, fill: float) -> Array:
    """[B, T, ...] -> [T / chunk, B, chunk, ...]. The batch axis stays sharded."""
    if missing := -x.shape[1] % chunk:
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _unchunk(x: Array, length: int) -> Array:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def _in_chunks(hidden: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, ...]:
    return _chunks(hidden, chunk, 0), _chunks(targets, chunk, -1), _chunks(weights, chunk, 0)


def _chunk_nll(
    hidden: Array, weight: Array, targets: Array, softcap: float
) -> tuple[Array, Array, Array]:
    """(nll [B, C], tanh of the scaled logits [B, C, V], log-sum-exp [B, C]) of one chunk."""
    tanh = jnp.tanh(jnp.dot(hidden, weight, preferred_element_type=jnp.float32) / softcap)
    log_z = jnp.log(jnp.exp(softcap * tanh).sum(axis=-1))
    picked = (
        softcap * jnp.take_along_axis(tanh, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    )
    return jnp.where(targets >= 0, log_z - picked, 0.0), tanh, log_z


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: Array, weight: Array, targets: Array, token_weights: Array, softcap: float, chunk: int
) -> tuple[Array, Array]:
    """Weighted sum of negative log-likelihoods, and each of them.
    Args:
      hidden: [B, T, D] final hidden states, in the compute dtype.
      weight: [D, V] unembedding.
      targets: [B, T] int32; negative means ignored.
      token_weights: [B, T] float32 factor of each token's loss in the sum (not differentiated).
      softcap: logits are softcap * tanh(logits / softcap).
      chunk: positions whose logits are computed at once.

    Returns as `token_nll`.
    """
    weight = weight.astype(hidden.dtype)

    def body(total, inputs):
        hidden, targets, scale = inputs
        nll, _, _ = _chunk_nll(hidden, weight, targets, softcap)
        return total + (nll * scale).sum(), nll

    inputs = _in_chunks(hidden, targets, token_weights, chunk)
    total, nll = jax.lax.scan(body, jnp.zeros((), jnp.float32), inputs)
    return total, _unchunk(nll, targets.shape[1])


def _cross_entropy_fwd(hidden, weight, targets, token_weights, softcap, chunk):
    cast = weight.astype(hidden.dtype)
    cast_t = transpose(cast)

    def body(carry, inputs):
        total, d_weight = carry
        hidden, targets, scale = inputs
        nll, tanh, log_z = _chunk_nll(hidden, cast, targets, softcap)
        scale = jnp.where(targets >= 0, scale, 0.0)[..., None]
        # fuses, where a scatter would copy the logits
        hit = targets[..., None] == jnp.arange(weight.shape[1])
        d_logits = (jnp.exp(softcap * tanh - log_z[..., None]) - hit) * (
            scale * (1.0 - tanh * tanh)
        )
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.dot(d_logits, cast_t, preferred_element_type=jnp.float32)
        d_weight += matmul_transposed(
            hidden.reshape(-1, weight.shape[0]), d_logits.reshape(-1, weight.shape[1])
        )
        return (total + (nll * scale[..., 0]).sum(), d_weight), (nll, d_hidden.astype(hidden.dtype))

    inputs = _in_chunks(hidden, targets, token_weights, chunk)
    start = (jnp.zeros((), jnp.float32), jnp.zeros(weight.shape, jnp.float32))
    (total, d_weight), (nll, d_hidden) = jax.lax.scan(body, start, inputs)
    length = targets.shape[1]
    return (total, _unchunk(nll, length)), (
        _unchunk(d_hidden, length),
        d_weight.astype(weight.dtype),
    )


def _cross_entropy_bwd(softcap, chunk, residuals, cotangents):
    d_hidden, d_weight = residuals
    scale, _ = cotangents
    return (
        d_hidden * scale.astype(d_hidden.dtype),
        d_weight * scale.astype(d_weight.dtype),
        None,
        None,
    )


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)

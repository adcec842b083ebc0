"""Logits to token ids on the device, every row with its own temperature, top-k, top-p and random stream.

A row's draw depends on its own logits, settings, seed and position only, so it is the same whoever shares the batch.
Work that no row of the batch asks for is skipped at run time, not by compiling another program.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SHORT_LIST = 64  # a top-k up to this many is drawn from a list of this length instead of the whole vocabulary


class SamplingParams(NamedTuple):
    """Settings of each row.

    Attributes:
        temperature: [B] float32; 0 takes the most likely token.
        top_k: [B] int32; keep the k most likely tokens, 0 keeps all.
        top_p: [B] float32 in (0, 1]; keep the fewest most likely tokens whose probability, after temperature and
            top-k, reaches p; 1 keeps all.
        seed: [B, 2] uint32; the high and low half of the request's seed.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array


def first_argmax(values: jax.Array) -> jax.Array:
    """Index [B] of the greatest of `values` [B, V], the first of equals; V where a row holds a NaN.

    Two plain reductions: XLA's argmax, which reduces values and indices together, is several times slower on CPU.
    """
    size = values.shape[-1]
    index = lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    greatest = jnp.max(values, axis=-1, keepdims=True)
    return jnp.min(jnp.where(values == greatest, index, size), axis=-1)


def sample(logits: jax.Array, params: SamplingParams, position: jax.Array) -> jax.Array:
    """Draw one token id per row.

    Args:
        logits: [B, V] float32.
        params: settings of each row.
        position: [B] int32, where in its sequence the drawn token will stand; names the row's random number.
    Returns:
        [B] int32; V (no valid id) for a row whose logits hold a NaN.
    """
    vocab_size = logits.shape[-1]
    short_list = min(SHORT_LIST, vocab_size)
    top_k = jnp.where((params.top_k == 0) | (params.top_k > vocab_size), vocab_size, params.top_k)

    random = params.temperature > 0
    short = random & (top_k <= short_list)
    whole = random & ~short & (top_k == vocab_size) & (params.top_p >= 1)
    ranked = random & ~short & ~whole

    keys = jax.random.wrap_key_data(params.seed, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, position)
    # With the greatest at 0, dividing by a tiny temperature cannot overflow upwards.
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = scaled / jnp.where(random, params.temperature, 1.0)[:, None]

    def draw(values: jax.Array) -> jax.Array:  # [B, N] -> [B], by the Gumbel-max trick
        noise = jax.vmap(lambda key: jax.random.gumbel(key, values.shape[-1:], values.dtype))(keys)
        return first_argmax(values + noise)

    def draw_ranked(size: int) -> jax.Array:
        values, ids = lax.top_k(scaled, size)
        rank = jnp.arange(size)
        values = jnp.where(rank < top_k[:, None], values, -jnp.inf)
        probabilities = jax.nn.softmax(values, axis=-1)
        more_likely = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The first rank stays whatever rounding does to the sums.
        values = jnp.where((rank == 0) | (more_likely < params.top_p[:, None]), values, -jnp.inf)
        ids = jnp.concatenate([ids, jnp.full_like(ids[:, :1], vocab_size)], axis=-1)  # the NaN answer of first_argmax
        return jnp.take_along_axis(ids, draw(values)[:, None], axis=-1)[:, 0]

    def replace(rows: jax.Array, tokens: jax.Array, drawn: Callable[[], jax.Array]) -> jax.Array:
        return lax.cond(jnp.any(rows), lambda: jnp.where(rows, drawn(), tokens), lambda: tokens)

    tokens = first_argmax(logits)
    tokens = replace(short, tokens, lambda: draw_ranked(short_list))
    tokens = replace(whole, tokens, lambda: draw(scaled))
    return replace(ranked, tokens, lambda: draw_ranked(vocab_size))

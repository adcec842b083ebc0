"""Logits to token ids on the device, every row with its own temperature, top-k, top-p and random stream.

A row's draw depends on its own logits, settings, seed and position only, so it is the same whoever shares the batch.
Work that no row of the batch asks for is skipped at run time, not by compiling another program.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SHORT_LIST = 256  # most draws are made among this many most likely tokens, without sorting the whole vocabulary
MIN_TEMPERATURE = 1e-6  # at and below it only equal logits could share the draw; treated as 0

Draws = Callable[[], tuple[jax.Array, jax.Array]]  # tokens [B], and for which rows they are right [B]


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
    """Index [B] of the greatest of `values` [B, V], the first of equals. Rows with a NaN have no defined answer.

    Two plain reductions: XLA's argmax, which reduces values and indices together, is several times slower on CPU.
    """
    size = values.shape[-1]
    index = lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    greatest = jnp.max(values, axis=-1, keepdims=True)
    return jnp.min(jnp.where(values == greatest, index, size), axis=-1)


def log_probability(logits: jax.Array, tokens: jax.Array, asked: jax.Array) -> jax.Array:
    """Natural log-probabilities [B] of `tokens` [B] under `logits` [B, V]; NaN for rows that `asked` [B] leaves out."""

    def compute() -> jax.Array:
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1, mode="fill")[:, 0]
        return jnp.where(asked, chosen - jax.nn.logsumexp(logits, axis=-1), jnp.nan)

    return lax.cond(jnp.any(asked), compute, lambda: jnp.full(tokens.shape, jnp.nan, logits.dtype))


def sample(logits: jax.Array, params: SamplingParams, position: jax.Array) -> jax.Array:
    """Draw one token id per row.

    Args:
        logits: [B, V] float32.
        params: settings of each row.
        position: [B] int32, where in its sequence the drawn token will stand; names the row's random number.
    Returns:
        [B] int32; V (no valid id) for a row whose logits are not all finite.
    """
    vocab_size = logits.shape[-1]
    short_list = min(SHORT_LIST, vocab_size)
    top_k = jnp.where((params.top_k == 0) | (params.top_k > vocab_size), vocab_size, params.top_k)

    random = params.temperature > MIN_TEMPERATURE
    unbounded = top_k == vocab_size
    whole = random & unbounded & (params.top_p >= 1)
    ranked = random & ~whole
    listed = ranked & ((top_k <= short_list) | unbounded)

    keys = jax.random.wrap_key_data(params.seed, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, position)

    def scale(values: jax.Array) -> jax.Array:
        # With the greatest at 0, dividing by a small temperature cannot overflow upwards.
        values = values - jnp.max(values, axis=-1, keepdims=True)
        return values / jnp.where(random, params.temperature, 1.0)[:, None]

    def draw(values: jax.Array) -> jax.Array:  # [B, N] -> [B], by the Gumbel-max trick
        noise = jax.vmap(lambda key: jax.random.gumbel(key, values.shape[-1:], values.dtype))(keys)
        return first_argmax(values + noise)

    def draw_ranked(size: int) -> tuple[jax.Array, jax.Array]:
        """Draws among the `size` most likely, and whether all that top-k and top-p keep were among them: [B] each."""
        values, ids = lax.top_k(logits, size)
        values, rank = scale(values), jnp.arange(size)
        values = jnp.where(rank < top_k[:, None], values, -jnp.inf)
        weights = jnp.exp(values)
        total = jnp.sum(weights, axis=-1)
        beyond = listed & (top_k > size)
        total = lax.cond(
            jnp.any(beyond), lambda: jnp.where(beyond, jnp.sum(jnp.exp(scale(logits)), axis=-1), total), lambda: total
        )
        more_likely = (jnp.cumsum(weights, axis=-1) - weights) / total[:, None]
        # The first rank stays whatever rounding does to the sums.
        kept = jnp.where((rank == 0) | (more_likely < params.top_p[:, None]), values, -jnp.inf)
        tokens = jnp.take_along_axis(ids, draw(kept)[:, None], axis=-1)[:, 0]
        return tokens, ~beyond | (jnp.sum(weights, axis=-1) / total >= params.top_p)

    def when_any(rows: jax.Array, draws: Draws, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Replace the tokens of `rows` that `draws` settles, and say which those are."""

        def replace() -> tuple[jax.Array, jax.Array]:
            drawn, settled = draws()
            return jnp.where(rows & settled, drawn, tokens), rows & settled

        return lax.cond(jnp.any(rows), replace, lambda: (tokens, jnp.zeros_like(rows)))

    tokens = first_argmax(logits)
    tokens, _ = when_any(whole, lambda: (draw(scale(logits)), whole), tokens)
    tokens, settled = when_any(listed, lambda: draw_ranked(short_list), tokens)
    tokens, _ = when_any(ranked & ~settled, lambda: draw_ranked(vocab_size), tokens)
    # A sum, because reductions by maximum pass over a NaN on some backends.
    return jnp.where(jnp.isfinite(jnp.sum(logits, axis=-1)), tokens, vocab_size)

"""Logits to token ids on the device, every row with its own temperature, top-k, top-p and random stream.

A row's draw depends on its own logits, settings, seed and position only, so it is the same whoever shares the batch.
Work that no row of the batch asks for is skipped at run time, not by compiling another program.

Logits are [V, B] here, the vocabulary first: for a few rows that is the faster side of the unembedding to be on, and
reductions over the vocabulary then run over whole vectors of rows. They may come before a monotone map, the softcap:
the most likely tokens are the same without it, and the map is applied to those few.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nanochat_jax.model.loss import first_argmax

SHORT_LISTS = (64, 512)  # how many most likely tokens are looked at, first and next, before the whole vocabulary is sorted
MIN_TEMPERATURE = 1e-6  # at and below it only equal logits could share the draw; treated as 0

Map = Callable[[Array], Array]


class SamplingParams(NamedTuple):
    """Settings of each row.

    Attributes:
        temperature: [B] float32; 0 takes the most likely token.
        top_k: [B] int32; keep the k most likely tokens, 0 keeps all.
        top_p: [B] float32 in (0, 1]; keep the fewest most likely tokens whose probability, after temperature and
            top-k, reaches p; 1 keeps all.
        seed: [B, 2] uint32; the high and low half of the request's seed.
    """

    temperature: Array | np.ndarray
    top_k: Array | np.ndarray
    top_p: Array | np.ndarray
    seed: Array | np.ndarray


def noise_for(seed: Array | np.ndarray, position: Array | np.ndarray, vocab_size: int) -> Array:
    """Gumbel noise [..., B, N] of the draws of rows with `seed` [B, 2], for tokens at `position` [..., B] of a sequence.

    For several steps at once, since for a few numbers a CPU takes as long. N is what any draw of `sample` needs.
    """
    block = _block_size(vocab_size)
    count = max(SHORT_LISTS[-1], -(-vocab_size // block) + block)

    def of_row(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (count,))

    return jnp.vectorize(of_row, signature="(k),()->(n)")(jnp.broadcast_to(seed, (*position.shape, 2)), position)


def identity(x: Array) -> Array:
    return x


def _blocks(logits: Array, size: int) -> Array:
    """Logits [V, B] as [V / size, size, B], filled up with -inf."""
    missing = -logits.shape[0] % size
    if missing:
        logits = jnp.pad(logits, ((0, missing), (0, 0)), constant_values=-jnp.inf)
    return logits.reshape(-1, size, logits.shape[1])


def _block_size(vocab_size: int, count: int = 1) -> int:
    """A power of two near the size of which as many numbers are looked at among blocks as in the chosen `count`."""
    return 2 ** max(0, round(math.log2(vocab_size / count) / 2))


def _top_k(values: Array, count: int) -> tuple[Array, Array]:
    # Without the barriers XLA pushes what reads only the first of them into top-k, and then sorts everything instead.
    # One barrier for both would abort its compiler (the pass TopkDecomposer).
    values, index = lax.top_k(values, count)
    return lax.optimization_barrier(values), lax.optimization_barrier(index)


def most_likely(logits: Array, count: int) -> tuple[Array, Array]:
    """The `count` greatest of logits [V, B], falling, and their ids: [B, count] each; of equals the first ids.

    All of them lie in the `count` blocks of the greatest maxima, so only those are ranked.
    """
    vocab_size, rows = logits.shape
    size = _block_size(vocab_size, count)
    if size < 4:
        return _top_k(logits.T, count)
    blocks = _blocks(logits, size)
    _, chosen = _top_k(jnp.max(blocks, axis=1).T, count)
    ids = (jnp.sort(chosen, axis=-1)[:, :, None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(rows, -1)
    # Ids of the filling are out of range.
    candidates = logits.at[ids, jnp.arange(rows)[:, None]].get(mode="fill", fill_value=-jnp.inf)
    values, index = _top_k(candidates, count)
    return values, jnp.take_along_axis(ids, index, axis=-1)


def log_probability(logits: Array, tokens: Array, asked: Array, transform: Map = identity) -> Array:
    """Natural log-probabilities [B] of `tokens` [B] under logits [V, B]; NaN for rows that `asked` [B] leaves out."""

    def compute() -> Array:
        chosen = transform(logits.at[tokens, jnp.arange(len(tokens))].get(mode="fill", fill_value=jnp.nan))
        return jnp.where(asked, chosen - jax.nn.logsumexp(transform(logits), axis=0), jnp.nan)

    return lax.cond(jnp.any(asked), compute, lambda: jnp.full(tokens.shape, jnp.nan, logits.dtype))


def sample(logits: Array, params: SamplingParams, noise: Array, transform: Map = identity) -> Array:
    """Draw one token id per row.

    Args:
        logits: [V, B] float32.
        params: settings of each row.
        noise: [B, N] float32, of `noise_for`. A row draws once, whichever way, so all ways share it.
        transform: monotone map of the logits, elementwise, still to be applied.
    Returns:
        [B] int32; V (no valid id) for a row whose logits are not all finite.
    """
    vocab_size, rows = logits.shape
    top_k = jnp.where((params.top_k == 0) | (params.top_k > vocab_size), vocab_size, params.top_k)
    random = jnp.asarray(params.temperature > MIN_TEMPERATURE)
    whole = random & (top_k == vocab_size) & (params.top_p >= 1)
    temperature = jnp.where(random, params.temperature, 1.0)

    def draw(values: Array) -> Array:  # [B, M] -> [B], by the Gumbel-max trick
        if values.shape[-1] > SHORT_LISTS[-1]:
            return draw_by_block(values.T)
        return first_argmax(values + noise[:, : values.shape[-1]])

    def draw_by_block(values: Array) -> Array:  # [M, B] -> [B]
        """A block by its probability, then one of the block: two short draws instead of one of many numbers."""
        size = _block_size(len(values))
        blocks = _blocks(values, size)
        block = first_argmax(jax.nn.logsumexp(blocks, axis=1).T + noise[:, : len(blocks)])
        inside = blocks[block, :, jnp.arange(rows)]
        return block * size + first_argmax(inside + noise[:, len(blocks) : len(blocks) + size])

    def all_scaled(greatest: Array) -> Array:  # [V, B]
        return (transform(logits) - greatest) / temperature

    def draw_listed(count: int) -> tuple[Array, Array, Array]:
        """Draws among the `count` most likely; whether all that top-k and top-p keep were among them; the greatest."""
        values, ids = most_likely(logits, count)
        values = transform(values)
        greatest, rank = values[:, 0], jnp.arange(count)
        # With the greatest at 0, dividing by a small temperature cannot overflow upwards.
        values = jnp.where(rank < top_k[:, None], (values - greatest[:, None]) / temperature[:, None], -jnp.inf)
        weights = jnp.exp(values)
        listed = total = jnp.sum(weights, axis=-1)
        beyond = random & ~whole & (top_k > count)
        if count < vocab_size:
            # Exact only where top-k keeps all; a bound that leaves other rows to a longer list.
            total = lax.cond(jnp.any(beyond & (top_k == vocab_size)),
                             lambda: jnp.where(beyond, jnp.sum(jnp.exp(all_scaled(greatest)), axis=0), total), lambda: total)
        more_likely = (jnp.cumsum(weights, axis=-1) - weights) / total[:, None]
        # The first rank stays whatever rounding does to the sums.
        kept = jnp.where((rank == 0) | (more_likely < params.top_p[:, None]), values, -jnp.inf)
        index = jnp.where(random, draw(kept), 0)
        settled = ~beyond | ((top_k == vocab_size) & (listed / total >= params.top_p))
        return jnp.take_along_axis(ids, index[:, None], axis=-1)[:, 0], settled, greatest

    counts = [count for count in SHORT_LISTS if count < vocab_size] + [vocab_size]
    tokens, settled, greatest = draw_listed(counts[0])
    tokens = lax.cond(jnp.any(whole), lambda: jnp.where(whole, draw_by_block(all_scaled(greatest)), tokens), lambda: tokens)
    for count in counts[1:]:

        def replace(tokens: Array = tokens, settled: Array = settled, count: int = count) -> tuple[Array, Array]:
            longer, enough, _ = draw_listed(count)
            return jnp.where(settled, tokens, longer), settled | enough

        tokens, settled = lax.cond(jnp.all(settled), lambda pair=(tokens, settled): pair, replace)
    # A sum, because reductions by maximum pass over a NaN on some backends.
    return jnp.where(jnp.isfinite(jnp.sum(logits, axis=0)), tokens, vocab_size)

"""Logits to token ids, with temperature, top-k, top-p and random stream per row.

A row's draw depends only on its own logits, settings, seed and position, so other requests in the
batch do not change it. `lax.cond` skips work that no row needs: if all rows are greedy, nothing is
ranked.

Logits are [V, B]: for few rows, the unembedding matmul is faster in this layout, and reductions
over the vocabulary read contiguous rows. A monotone map such as the softcap preserves their order,
so it is applied later, only to the values that need it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nanochat_jax.model.loss import first_argmax

SHORT_LISTS = (64, 512)  # candidates ranked first and second; then the full vocabulary
MIN_TEMPERATURE = 1e-6  # at or below: treated as 0 (greedy)

Map = Callable[[Array], Array]


class SamplingParams(NamedTuple):
    """Settings of each row.

    Attributes:
        temperature: [B] float32; 0 takes the most likely token.
        top_k: [B] int32; keep the k most likely tokens, 0 keeps all.
        top_p: [B] float32 in (0, 1]; keep the fewest most likely tokens whose probability, after
            temperature and top-k, reaches p; 1 keeps all.
        seed: [B, 2] uint32; the high and low half of the request's seed.
    """

    temperature: Array | np.ndarray
    top_k: Array | np.ndarray
    top_p: Array | np.ndarray
    seed: Array | np.ndarray


class _Rows(NamedTuple):
    """`SamplingParams` with defaults resolved."""

    random: Array  # [B] bool: not greedy
    unlimited: Array  # [B] bool: random, without top-k and top-p
    temperature: Array  # [B]; 1 for greedy rows
    top_k: Array  # [B]; the vocabulary's size where all are kept
    top_p: Array | np.ndarray


def identity(x: Array) -> Array:
    return x


def sample(logits: Array, params: SamplingParams, noise: Array, transform: Map = identity) -> Array:
    """Draw one token id per row. At temperature 0, it is the most likely token.

    Args:
        logits: [V, B] float32.
        params: settings of each row.
        noise: [B, N] float32, from `noise_for`.
        transform: elementwise monotone map to apply to the logits.
    Returns:
        [B] int32; V (no valid id) for a row whose logits are not all finite.
    """
    vocab_size = logits.shape[0]
    random = jnp.asarray(params.temperature > MIN_TEMPERATURE)
    top_k = jnp.where((params.top_k == 0) | (params.top_k > vocab_size), vocab_size, params.top_k)
    rows = _Rows(
        random,
        random & (top_k == vocab_size) & (params.top_p >= 1),
        jnp.where(random, params.temperature, 1.0),
        top_k,
        params.top_p,
    )
    tokens = lax.cond(
        jnp.any(random),
        lambda: _draw(logits, rows, noise, transform),
        lambda: first_argmax(logits, axis=0),
    )
    # A sum, because reductions by maximum pass over a NaN on some backends.
    return jnp.where(jnp.isfinite(jnp.sum(logits, axis=0)), tokens, vocab_size)


def _draw(logits: Array, rows: _Rows, noise: Array, transform: Map) -> Array:
    """Return token ids [B], drawn from the shortest candidate list that suffices for every row."""
    vocab_size = logits.shape[0]
    counts = [count for count in SHORT_LISTS if count < vocab_size] + [vocab_size]
    tokens, settled, greatest = _draw_listed(logits, counts[0], rows, noise, transform)

    def draw_unlimited() -> Array:
        scaled = (transform(logits) - greatest) / rows.temperature
        return jnp.where(rows.unlimited, _draw_by_block(scaled, noise), tokens)

    tokens = lax.cond(jnp.any(rows.unlimited), draw_unlimited, lambda: tokens)
    for count in counts[1:]:

        def draw_again(tokens: Array, settled: Array, count: int = count) -> tuple[Array, Array]:
            longer, enough, _ = _draw_listed(logits, count, rows, noise, transform)
            return jnp.where(settled, tokens, longer), settled | enough

        tokens, settled = lax.cond(
            jnp.all(settled), lambda *same: same, draw_again, tokens, settled
        )
    return tokens


def _draw_listed(
    logits: Array, count: int, rows: _Rows, noise: Array, transform: Map
) -> tuple[Array, Array, Array]:
    """Draw from the `count` most likely tokens.

    Returns token ids [B], whether the list contains every token that top-k and top-p keep [B], and
    the greatest logits [B].
    """
    vocab_size = logits.shape[0]
    values, ids = most_likely(logits, count)
    values = transform(values)
    greatest, rank = values[:, 0], jnp.arange(count)
    # With the greatest at 0, dividing by a small temperature cannot overflow.
    scaled = (values - greatest[:, None]) / rows.temperature[:, None]
    values = jnp.where(rank < rows.top_k[:, None], scaled, -jnp.inf)
    weights = jnp.exp(values)
    listed = total = jnp.sum(weights, axis=-1)
    beyond = rows.random & ~rows.unlimited & (rows.top_k > count)
    if count < vocab_size:
        # Exact only if top-k keeps all. Other rows are not settled and need a longer list.
        def sum_of_all() -> Array:
            every = (transform(logits) - greatest) / rows.temperature
            return jnp.where(beyond, jnp.sum(jnp.exp(every), axis=0), total)

        total = lax.cond(jnp.any(beyond & (rows.top_k == vocab_size)), sum_of_all, lambda: total)
    more_likely = (jnp.cumsum(weights, axis=-1) - weights) / total[:, None]
    # Rank 0 is kept regardless of rounding in the sums.
    kept = jnp.where((rank == 0) | (more_likely < rows.top_p[:, None]), values, -jnp.inf)
    if count > SHORT_LISTS[-1]:
        drawn = _draw_by_block(kept.T, noise)
    else:
        drawn = first_argmax(kept + noise[:, :count])  # the Gumbel-max trick
    index = jnp.where(rows.random, drawn, 0)  # greedy rows: rank 0
    settled = ~beyond | ((rows.top_k == vocab_size) & (listed / total >= rows.top_p))
    return jnp.take_along_axis(ids, index[:, None], axis=-1)[:, 0], settled, greatest


def _draw_by_block(values: Array, noise: Array) -> Array:
    """Draw indices [B] from scaled logits [M, B]: first a block, then a token within it.

    Two short draws need less noise than one over all M.
    """
    rows, size = values.shape[1], _block_size(len(values))
    blocks = _blocks(values, size)
    block = first_argmax(jax.nn.logsumexp(blocks, axis=1).T + noise[:, : len(blocks)])
    inside = blocks[block, :, jnp.arange(rows)]
    return block * size + first_argmax(inside + noise[:, len(blocks) : len(blocks) + size])


def noise_for(seed: Array | np.ndarray, position: Array | np.ndarray, vocab_size: int) -> Array:
    """Return Gumbel noise [..., B, N] for `seed` [B, 2] and token `position` [..., B].

    N suffices for any draw of `sample`. One call covers several steps, because on a CPU the cost
    hardly depends on the count.
    """
    block = _block_size(vocab_size)
    count = max(SHORT_LISTS[-1], -(-vocab_size // block) + block)

    def of_row(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (count,))

    return jnp.vectorize(of_row, signature="(k),()->(n)")(
        jnp.broadcast_to(seed, (*position.shape, 2)), position
    )


# ------------------------------------------------------------------------------------------ ranking


def most_likely(logits: Array, count: int) -> tuple[Array, Array]:
    """Return the `count` greatest of logits [V, B], descending, and their ids: [B, count] each.

    Ties go to the lowest id. Only the `count` blocks with the greatest maxima are ranked, because
    they contain all results.
    """
    vocab_size, rows = logits.shape
    size = _block_size(vocab_size, count)
    if size < 4:
        return _top_k(logits.T, count)
    blocks = _blocks(logits, size)
    _, chosen = _top_k(jnp.max(blocks, axis=1).T, count)
    ids = (
        jnp.sort(chosen, axis=-1)[:, :, None] * size + jnp.arange(size, dtype=jnp.int32)
    ).reshape(rows, -1)
    # Padding ids are out of range.
    candidates = logits.at[ids, jnp.arange(rows)[:, None]].get(mode="fill", fill_value=-jnp.inf)
    values, index = _top_k(candidates, count)
    return values, jnp.take_along_axis(ids, index, axis=-1)


def _top_k(values: Array, count: int) -> tuple[Array, Array]:
    # Without the barriers, XLA fuses consumers into top-k and falls back to a full sort. A single
    # barrier for both results aborts XLA in the TopkDecomposer pass.
    values, index = lax.top_k(values, count)
    return lax.optimization_barrier(values), lax.optimization_barrier(index)


def _blocks(logits: Array, size: int) -> Array:
    """Reshape logits [V, B] to [ceil(V / size), size, B], padded with -inf."""
    missing = -logits.shape[0] % size
    if missing:
        logits = jnp.pad(logits, ((0, missing), (0, 0)), constant_values=-jnp.inf)
    return logits.reshape(-1, size, logits.shape[1])


def _block_size(vocab_size: int, count: int = 1) -> int:
    """Block size that minimizes work: ranking `vocab_size / size` block maxima plus `count * size`
    candidates.

    A power of two near `sqrt(vocab_size / count)`.
    """
    return 2 ** max(0, round(math.log2(vocab_size / count) / 2))


def log_probability(
    logits: Array, tokens: Array, requested: Array, transform: Map = identity
) -> Array:
    """Return natural log-probabilities [B] of `tokens` [B] under logits [V, B].

    Rows where `requested` [B] is false are NaN.
    """

    def compute() -> Array:
        chosen = transform(
            logits.at[tokens, jnp.arange(len(tokens))].get(mode="fill", fill_value=jnp.nan)
        )
        return jnp.where(requested, chosen - jax.nn.logsumexp(transform(logits), axis=0), jnp.nan)

    return lax.cond(
        jnp.any(requested), compute, lambda: jnp.full(tokens.shape, jnp.nan, logits.dtype)
    )

"""Sampling: the right distribution, and a draw that depends on its own row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.infer.sampling import (
    SHORT_LISTS,
    SamplingParams,
    first_argmax,
    log_probability,
    most_likely,
    noise_for,
    sample,
)

ROWS, VOCAB = 250, 2 * SHORT_LISTS[-1]  # one shape for all tests: one compilation


@jax.jit
def compiled(logits, params, position):
    return sample(logits, params, noise_for(params.seed, position, VOCAB))


def draw(logits, params, position=0):
    """Tokens of a few rows; the rest of the batch are greedy rows."""
    rows = len(params.temperature)
    logits = np.broadcast_to(np.asarray(logits, np.float32), (rows, VOCAB))
    position = np.broadcast_to(np.asarray(position, np.int32), (rows,))
    fill = [(0, ROWS - rows)]
    params = SamplingParams(*(np.pad(x, fill + [(0, 0)] * (x.ndim - 1)) for x in params))
    return np.asarray(compiled(np.pad(logits, [*fill, (0, 0)]).T, params, np.pad(position, fill)))[
        :rows
    ]


def settings(rows, temperature=1.0, top_k=0, top_p=1.0, seeds=None):
    def column(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), (rows,))

    seeds = np.arange(rows) if seeds is None else np.asarray(seeds)
    seed = np.stack([np.zeros_like(seeds), seeds], axis=-1).astype(np.uint32)
    return SamplingParams(
        column(temperature, np.float32), column(top_k, np.int32), column(top_p, np.float32), seed
    )


MIXED = {
    "temperature": [0, 1, 1, 0.8, 1, 3],
    "top_k": [0, 0, 50, 0, 600, 0],
    "top_p": [1, 1, 1, 0.9, 0.9, 0.99],
}


def reference(logits, temperature, top_k, top_p):
    """Probabilities of one row: temperature, then top-k, then the smallest head that reaches p."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    order = order[: top_k or len(order)]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    weights = np.where(before < top_p, weights, 0)
    full = np.zeros(len(logits))
    full[order] = weights / weights.sum()
    return full


def test_first_argmax_takes_the_first_of_equals():
    values = jnp.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-jnp.inf] * 4])
    assert first_argmax(values).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        *((1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 7, 1.0), (1.0, 0, 0.6), (0.7, 20, 0.8)),
        *((1.0, 300, 1.0), (1.5, 300, 0.95), (8.0, 0, 0.97), (1.0, 1, 1.0), (1.0, 0, 1e-6)),
    ],
)
def test_frequencies_follow_the_restricted_softmax(temperature, top_k, top_p):
    rounds = 8
    logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2
    expected = reference(logits, temperature, top_k, top_p)
    params = settings(ROWS, temperature, top_k, top_p)
    drawn = np.concatenate([draw(logits, params, position) for position in range(rounds)])
    counts = np.bincount(drawn, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0  # nothing outside of the restriction
    # Pearson's statistic over cells of at least 5 expected draws, the rest in one cell: its mean
    # is cells - 1.
    wanted = expected * ROWS * rounds
    large = wanted >= 5
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(wanted[large], wanted[~large].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = max(len(wanted) - 1, 1)
    assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_a_nucleus_wider_than_the_short_list_is_not_cut():
    params = settings(ROWS, top_p=0.75)
    drawn = np.concatenate([draw(np.zeros(VOCAB), params, position) for position in range(6)])
    assert len(np.unique(drawn)) > SHORT_LISTS[-1]
    assert 0.74 * VOCAB < drawn.max() < 0.75 * VOCAB  # of equal logits the first three quarters


def test_temperature_zero_and_top_k_one_are_the_argmax():
    logits = np.random.default_rng(1).normal(size=(6, VOCAB)).astype(np.float32)
    best = logits.argmax(-1).tolist()
    for params in (
        settings(6, temperature=0.0),
        settings(6, top_k=1),
        settings(6, top_p=1e-9),
        settings(6, temperature=1e-9),
        settings(6, temperature=1e-4, top_k=5),
    ):
        assert draw(logits, params).tolist() == best


def test_temperature_zero_takes_the_first_of_equals():
    logits = np.zeros((1, VOCAB))
    logits[0, [33, 500]] = 9.0
    assert draw(logits, settings(1, temperature=0.0)).tolist() == [33]


def test_a_draw_does_not_depend_on_other_rows():
    """Greedy company or a batch that takes every path."""
    logits = np.random.default_rng(2).normal(size=(6, VOCAB)).astype(np.float32)
    together = settings(6, **MIXED)
    position = np.arange(6) + 7
    drawn = draw(logits, together, position)
    for row in range(6):
        alone = SamplingParams(*(x[row : row + 1] for x in together))
        assert draw(logits[row], alone, position[row]) == drawn[row]


def test_draws_differ_by_seed_and_by_position_and_repeat_for_equal_ones():
    flat = np.zeros(VOCAB)
    by_seed = draw(flat, settings(64)).tolist()
    assert len(set(by_seed)) > 50
    assert draw(flat, settings(64)).tolist() == by_seed
    one_seed = settings(64, seeds=[5] * 64)
    assert len(set(draw(flat, one_seed, np.arange(64)).tolist())) > 50
    assert len(set(draw(flat, one_seed).tolist())) == 1


@pytest.mark.parametrize(
    ("vocab_size", "count"), [(65536, 64), (5003, 64), (5003, 512), (70, 64), (64, 64)]
)
def test_the_most_likely_come_in_order_and_of_equals_the_first(vocab_size, count):
    logits = np.random.default_rng(3).integers(-40, 40, (3, vocab_size)).astype(np.float32)
    values, ids = jax.jit(most_likely, static_argnums=1)(logits.T, count)
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    assert np.array_equal(ids, expected)
    assert np.array_equal(values, np.take_along_axis(logits, expected, axis=-1))


def test_a_monotone_map_of_the_logits_may_come_late():
    logits = 20 * np.random.default_rng(4).normal(size=(6, VOCAB)).astype(np.float32)
    params = settings(6, **MIXED)

    def cap(x):
        return 15 * jnp.tanh(x / 15)

    late = jax.jit(lambda x: sample(x, params, noise_for(params.seed, jnp.arange(6), VOCAB), cap))(
        logits.T
    )
    assert late.tolist() == compiled(cap(logits.T), params, np.arange(6)).tolist()


def test_log_probabilities_are_of_the_whole_softmax_and_only_of_rows_that_ask():
    logits = np.random.default_rng(5).normal(size=(4, VOCAB)).astype(np.float32)
    tokens, asked = np.array([3, 0, VOCAB - 1, 7]), np.array([True, False, True, True])
    found = np.asarray(jax.jit(log_probability)(logits.T, tokens, asked))
    expected = logits[range(4), tokens] - np.log(np.exp(logits.astype(np.float64)).sum(-1))
    assert np.isnan(found[1]) and np.allclose(found[asked], expected[asked], atol=1e-6)
    assert np.isnan(np.asarray(jax.jit(log_probability)(logits.T, tokens, np.zeros(4, bool)))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_give_no_valid_token(value):
    logits = np.zeros((5, VOCAB))
    logits[:, 3] = value
    params = settings(
        5, temperature=[0, 1, 1, 1, 1], top_k=[0, 0, 5, 0, 400], top_p=[1, 1, 1, 0.5, 1]
    )
    assert draw(logits, params).tolist() == [VOCAB] * 5

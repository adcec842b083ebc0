"""The chunked cross-entropy equals the plain one in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model.loss import CHUNK_ELEMENTS, chunk_length, cross_entropy

SOFTCAP = 15.0


def plain(hidden, weight, targets, scale):
    logits = SOFTCAP * jnp.tanh(hidden @ weight / SOFTCAP)
    nll = -jnp.take_along_axis(
        jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1
    )[..., 0]
    nll = jnp.where(targets >= 0, nll, 0.0)
    return (nll * scale).sum(), nll


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 50, (3, 8)).astype(np.int32)
    targets[0, 2] = targets[2, 7] = -1
    return (
        jnp.asarray(rng.normal(0, 4, (3, 8, 16)), jnp.float32),
        jnp.asarray(rng.normal(0, 1, (16, 50)), jnp.float32),
        jnp.asarray(targets),
        jnp.asarray(rng.normal(0, 1, (3, 8)), jnp.float32),
    )


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 9])
def test_value_and_gradients_equal_the_plain_form(batch, chunk):
    hidden, weight, targets, scale = batch
    run = lambda f: jax.value_and_grad(lambda h, w: f(h, w), argnums=(0, 1), has_aux=True)(
        hidden, weight
    )  # noqa: E731
    (total, nll), grads = run(lambda h, w: cross_entropy(h, w, targets, scale, SOFTCAP, chunk))
    (plain_total, plain_nll), plain_grads = run(lambda h, w: plain(h, w, targets, scale))
    np.testing.assert_allclose(total, plain_total, rtol=1e-5)
    np.testing.assert_allclose(nll, plain_nll, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, plain_grads):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_nothing_to_train_on_gives_zero_loss_and_gradients(batch):
    hidden, weight, targets, scale = batch
    grad = jax.grad(
        lambda h, w: cross_entropy(h, w, jnp.full_like(targets, -1), scale, SOFTCAP, 4)[0], (0, 1)
    )
    assert all((g == 0).all() for g in grad(hidden, weight))


@pytest.mark.parametrize("length", [2048, 2047, 1500])
def test_full_logits_are_never_in_memory(length):
    batch, width, vocab = 4, 32, 32768
    chunk = chunk_length((batch, length), vocab)
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((batch, length, width), jnp.float32),
            ((width, vocab), jnp.float32),
            ((batch, length), jnp.int32),
            ((batch, length), jnp.float32),
        )
    ]
    grad = jax.jit(
        jax.grad(lambda h, w, t, s: cross_entropy(h, w, t, s, SOFTCAP, chunk)[0], (0, 1))
    )
    temporary = grad.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert temporary < batch * length * vocab * 4 / 1.5


def test_chunks_fit_the_budget_and_cover_the_length():
    for length in (2048, 2047, 1500, 7):
        for vocab in (2048, 65536):
            chunk = chunk_length((8, length), vocab)
            assert 8 * chunk * vocab <= CHUNK_ELEMENTS + 8 * vocab and 1 <= chunk <= length
    assert chunk_length((32, 2048), 65536) == 16  # no filling where a power of two will do

"""Properties of the model: causality, windows, and that decoding through the cache equals the full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.attention import causal_attention
from nanochat_jax.config import GPTConfig
from nanochat_jax.gpt import REMAT, forward, init_cache, init_params, unembed

CONFIGS = {
    "classic": GPTConfig.classic(2, n_embd=32, n_head=4, n_kv_head=2, vocab_size=97, sequence_len=512),
    "modern": GPTConfig.modern(5, n_embd=32, n_head=4, n_kv_head=2, vocab_size=97, sequence_len=512),
}


def random_params(config):
    """Every weight random, so that nothing hides behind a zero initialisation."""
    leaves, treedef = jax.tree.flatten(init_params(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(treedef, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def random_tokens(config, *shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, shape), jnp.int32)


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    config = CONFIGS[request.param]
    return config, random_params(config)


def test_gradients_prove_causality(model):
    config, params = model
    tokens = random_tokens(config, 1, 12)

    def hidden_at(table, position):  # each position has its own row of the table, so that gradients tell them apart
        own = params | {"wte": table}
        if config.value_embeds:
            own["value_embeds"] = params["value_embeds"][:, tokens[0]]
        return forward(own, jnp.arange(12)[None], config=config)[0][0, position].sum()

    for position in (0, 5, 11):
        gradient = np.abs(jax.grad(hidden_at)(params["wte"][tokens[0]], position)).sum(axis=-1)
        assert (gradient[position + 1 :] == 0).all()
        assert (gradient[: position + 1] > 0).all()


def test_cached_decode_equals_full_forward_for_rows_at_different_positions(model):
    """Lengths cross the short window (128), prefill is in uneven pieces with padding, one row at a time sits still."""
    config, params = model
    length = 140
    tokens = random_tokens(config, 3, length)
    expected = unembed(params, forward(params, tokens, config=config)[0], config=config)
    step = jax.jit(lambda tokens, valid, cache: forward(params, tokens, config=config, cache=cache, valid=valid))
    cache = init_cache(config, 3, 160)
    done = np.zeros(3, int)
    for count in (np.array([130, 7, 1]), np.array([5, 0, 130]), np.array([1, 121, 1])):
        piece = np.zeros((3, 130), np.int32)
        for row, n in enumerate(count):
            piece[row, :n] = tokens[row, done[row] : done[row] + n]
        hidden, cache = step(piece, count.astype(np.int32), cache)
        logits = unembed(params, hidden, config=config)
        for row, n in enumerate(count):
            np.testing.assert_allclose(logits[row, :n], expected[row, done[row] : done[row] + n], atol=2e-4)
        done += count
    while (done < length).any():
        active = done < length
        piece = tokens[np.arange(3), np.minimum(done, length - 1)][:, None]
        hidden, cache = step(piece, active.astype(np.int32), cache)
        logits = unembed(params, hidden, config=config)[:, 0]
        for row in np.flatnonzero(active):
            np.testing.assert_allclose(logits[row], expected[row, done[row]], atol=2e-4)
        done += active
    assert (np.asarray(cache.length) == length).all()


@pytest.mark.parametrize("window", [None, 0, 3, 130])
def test_attention_equals_a_plain_masked_softmax(window):
    q, k, v = (jax.random.normal(key, (2, 200, heads, 8)) for key, heads in zip(jax.random.split(jax.random.key(2), 3), (4, 2, 2)))
    scores = np.einsum("bthd,bshd->bhts", q, np.repeat(k, 2, axis=2)) / np.sqrt(8)
    distance = np.arange(200)[:, None] - np.arange(200)[None]
    visible = (distance >= 0) & (distance <= (200 if window is None else window))
    weights = np.where(visible, np.exp(scores), 0)
    expected = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, axis=2))
    np.testing.assert_allclose(causal_attention(q, k, v, window=window), expected, atol=1e-5)


@pytest.mark.parametrize("remat", ["block", "full"])
def test_rematerialised_gradients_equal_plain_ones(model, remat):
    config, params = model
    tokens = random_tokens(config, 1, 20)
    gradient = lambda remat: jax.grad(lambda p: (forward(p, tokens, config=config, remat=remat)[0] ** 2).sum())(params)  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient(remat), gradient("none"))


def test_rematerialisation_keeps_fewer_activations_for_the_backward_pass():
    config = dataclasses.replace(CONFIGS["modern"], n_layer=9)
    params, tokens = init_params(config, jax.random.key(0)), random_tokens(config, 4, 64)
    kept = {}
    for remat in REMAT:
        _, backward = jax.vjp(lambda p, remat=remat: forward(p, tokens, config=config, remat=remat)[0], params)
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(backward))
    assert kept["none"] > 2 * kept["block"] and kept["block"] > kept["full"]


def test_initial_classic_loss_is_ln_v():
    config = CONFIGS["classic"]
    hidden, _ = forward(init_params(config, jax.random.key(3)), random_tokens(config, 2, 9), config=config)
    logits = unembed(init_params(config, jax.random.key(3)), hidden, config=config)
    assert (logits == 0).all()


@pytest.mark.parametrize("change", [dict(n_head=3), dict(n_kv_head=3), dict(window_pattern="SX"), dict(n_layer=0)])
def test_impossible_shapes_are_refused_with_the_value(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        dataclasses.replace(CONFIGS["modern"], **change)

"""The model is causal, and decoding through the cache equals the full forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nanochat_jax.model import gpt, size, weights
from nanochat_jax.model.attention import causal_attention
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.gpt import forward, init_cache, unembed
from nanochat_jax.model.loss import cross_entropy
from nanochat_jax.model.sharding import make_mesh, param_shardings
from nanochat_jax.model.weights import init_params
from nanochat_jax.train.optim import OptimizerConfig, Schedules, constant, make_optimizer

CONFIGS = {
    "classic": GPTConfig.classic(
        2, n_embd=32, n_head=4, n_kv_head=2, vocab_size=97, sequence_len=512
    ),
    "modern": GPTConfig.modern(
        5, n_embd=32, n_head=4, n_kv_head=2, vocab_size=97, sequence_len=512
    ),
}


def random_params(config):
    """Every weight random, so that nothing hides behind a zero initialisation."""
    rng, params = np.random.default_rng(1), init_params(config, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


@functools.partial(jax.jit, static_argnames="config")
def full_logits(params, tokens, config):
    return unembed(params, forward(params, tokens, config=config)[0], config=config)


def random_tokens(config, *shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, shape), jnp.int32)


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    config = CONFIGS[request.param]
    return config, random_params(config)


def test_gradients_prove_causality(model):
    config, params = model
    tokens = random_tokens(config, 1, 12)

    # each position has its own row of the table, so that gradients tell them apart
    @jax.jit
    @jax.grad
    def gradient_at(table, position):
        own = params | {"wte": table}
        if config.value_embeds:
            own["value_embeds"] = params["value_embeds"][:, tokens[0]]
        return forward(own, jnp.arange(12)[None], config=config)[0][0, position].sum()

    for position in (0, 5, 11):
        gradient = np.abs(gradient_at(params["wte"][tokens[0]], position)).sum(axis=-1)
        assert (gradient[position + 1 :] == 0).all()
        assert (gradient[: position + 1] > 0).all()


def test_cached_decode_equals_full_forward_for_rows_at_different_positions(model):
    """Lengths cross the short window (128); prefill is in uneven pieces; rows pause."""
    config, params = model
    length = 140
    tokens = random_tokens(config, 3, length)
    expected = full_logits(params, tokens, config)
    step = jax.jit(
        lambda tokens, valid, cache: forward(
            params, tokens, config=config, cache=cache, valid=valid
        )
    )
    cache = init_cache(config, 3, 160)
    done = np.zeros(3, int)
    for count in (np.array([130, 7, 1]), np.array([5, 0, 130]), np.array([1, 121, 1])):
        piece = np.zeros((3, 130), np.int32)
        for row, n in enumerate(count):
            piece[row, :n] = tokens[row, done[row] : done[row] + n]
        hidden, cache = step(piece, count.astype(np.int32), cache)
        logits = unembed(params, hidden, config=config)
        for row, n in enumerate(count):
            np.testing.assert_allclose(
                logits[row, :n], expected[row, done[row] : done[row] + n], atol=2e-4
            )
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


ODD_SHAPES = {
    "one layer": dict(n_layer=1),
    "one key/value head": dict(n_head=4, n_kv_head=1),
    "three heads": dict(n_head=3, n_kv_head=3, n_embd=36),
    "long windows first": dict(window_pattern="LSL", n_layer=4),
    "short windows only": dict(window_pattern="S", n_layer=2),
    "vocabulary of a prime size": dict(vocab_size=101, n_layer=2),
}


@pytest.mark.parametrize(
    "era, shape",
    [(era, s) for era in CONFIGS for s in ODD_SHAPES if era == "modern" or "window" not in s],
)
def test_any_shape_decodes_as_it_reads(era, shape):
    config = dataclasses.replace(CONFIGS[era], **{"n_layer": 2} | ODD_SHAPES[shape])
    params, tokens = random_params(config), random_tokens(config, 1, 150)
    expected = full_logits(params, tokens, config)
    assert expected.shape == (1, 150, config.vocab_size)
    cache = init_cache(config, 1, 150)

    @functools.partial(jax.jit, static_argnames="fresh")
    def step(tokens, cache, fresh=False):
        hidden, cache = forward(params, tokens, config=config, cache=cache, fresh=fresh)
        return unembed(params, hidden, config=config), cache

    fresh, filled = step(tokens[:, :146], cache, fresh=True)
    np.testing.assert_allclose(fresh, expected[:, :146], atol=2e-4)
    for start, stop in [(0, 146), *((i, i + 1) for i in range(146, 150))]:
        logits, cache = step(tokens[:, start:stop], cache)
        np.testing.assert_allclose(logits, expected[:, start:stop], atol=2e-4)
        if start == 0:  # an empty cache ends the same whether it is said to be empty or not
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), filled, cache)


@pytest.mark.parametrize("window", [None, 0, 3, 130])
def test_attention_equals_a_plain_masked_softmax(window):
    q, k, v = (
        jax.random.normal(key, (2, 200, heads, 8))
        for key, heads in zip(jax.random.split(jax.random.key(2), 3), (4, 2, 2))
    )
    scores = np.einsum("bthd,bshd->bhts", q, np.repeat(k, 2, axis=2)) / np.sqrt(8)
    distance = np.arange(200)[:, None] - np.arange(200)[None]
    visible = (distance >= 0) & (distance <= (200 if window is None else window))
    weights = np.where(visible, np.exp(scores), 0)
    expected = np.einsum(
        "bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, axis=2)
    )
    np.testing.assert_allclose(causal_attention(q, k, v, window=window), expected, atol=1e-5)


def test_initial_classic_loss_is_ln_v():
    config = CONFIGS["classic"]
    params, tokens = init_params(config, jax.random.key(3)), random_tokens(config, 2, 9)
    assert (full_logits(params, tokens, config) == 0).all()

    @jax.jit
    def losses(params):
        hidden, _ = forward(params, tokens, config=config)
        weights = jnp.ones(tokens.shape)
        return cross_entropy(hidden, params["lm_head"], tokens, weights, config.softcap, 9)[1]

    nll = losses(params)
    assert (nll == jnp.log(jnp.float32(config.vocab_size))).all()


@pytest.fixture
def gated(monkeypatch):
    """Models of more than two layers have a matrix that others lack."""

    class Gated(weights.Blocks):
        def __init__(self, config, declare):
            super().__init__(config, declare)
            if config.n_layer > 2:
                shape, axes = (config.n_layer, config.n_embd, 8), (weights.LAYERS, "embed", None)
                self.gate = declare(shape, axes, weights._constant(1.0), weights.MATRICES)

    derived = (weights._declared, weights.layer_weights, size.param_counts)
    monkeypatch.setattr(weights, "Blocks", Gated)
    for function in derived:
        function.cache_clear()
    yield
    for function in derived:
        function.cache_clear()


@pytest.mark.parametrize(
    "era, depth, gates, scan",
    [("modern", 3, 3, False), ("classic", 4, 4, True), ("classic", 2, 0, False)],
)
def test_an_optional_matrix_is_declared_in_one_place(gated, monkeypatch, era, depth, gates, scan):
    config = dataclasses.replace(CONFIGS[era], n_layer=depth)
    run_layer = gpt._layer

    def layer(x, matrices, *rest, context):
        assert ("gate" in matrices) == bool(gates)
        if gates:
            x = x + (x @ matrices["gate"]).sum(axis=-1, keepdims=True)
        return run_layer(x, matrices, *rest, context=context)

    monkeypatch.setattr(gpt, "_layer", layer)
    params, tokens = init_params(config, jax.random.key(0)), random_tokens(config, 1, 8)
    total = lambda params: forward(params, tokens, config, Compute(scan=scan))[0][..., 0].sum()
    grads = jax.jit(jax.grad(total))(params)
    assert size.num_params(config) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert len(params["blocks"].get("gate", ())) == gates
    if gates:
        schedules = Schedules(lr_multiplier=constant(1.0), momentum=constant(0.9))
        optimizer = make_optimizer(config, OptimizerConfig(), schedules)
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        assert (np.abs(updates["blocks"]["gate"]).max(axis=(1, 2)) > 0).all()
        sharding = param_shardings(config, make_mesh("8x1"), fsdp=True)["blocks"]["gate"]
        assert sharding.spec == PartitionSpec(None, "data", None)


ROOT_3, N = 3**0.5, 192
# name -> ("normal", standard deviation) or ("uniform", low, high) or a constant array, upstream's
# of each era at width N
INITIAL = {
    "classic": {
        "wte": ("normal", 1.0),
        "lm_head": 0.0,
        "c_q": ("normal", N**-0.5),
        "c_k": ("normal", N**-0.5 * 0.5**0.5),
        "c_v": ("normal", N**-0.5 * 0.5**0.5),
        "c_proj": 0.0,
        "mlp_fc": ("normal", N**-0.5),
        "mlp_proj": 0.0,
    },
    "modern": {
        "wte": ("normal", 0.8),
        "lm_head": ("normal", 0.001),
        "c_proj": 0.0,
        "mlp_proj": 0.0,
        "mlp_fc": ("uniform", -0.4 * ROOT_3 * N**-0.5, 0.4 * ROOT_3 * N**-0.5),
        **{
            name: ("uniform", -ROOT_3 * N**-0.5, ROOT_3 * N**-0.5)
            for name in ("c_q", "c_k", "c_v", "value_embeds")
        },
        "ve_gate": ("uniform", 0.0, 0.02),
        "smear_gate": ("uniform", 0.0, 0.02),
        "smear_lambda": 0.0,
        "backout_lambda": 0.2,
        "resid_lambdas": [1.15, 1.125, 1.10, 1.075, 1.05],
        "x0_lambdas": [0.20, 0.1625, 0.125, 0.0875, 0.05],
    },
}


@pytest.mark.parametrize("era", CONFIGS)
def test_initial_parameters_have_upstreams_distributions(era):
    """Half as many key/value heads, so that fan-out is not fan-in."""
    config = dataclasses.replace(
        CONFIGS[era], n_embd=N, n_head=4, n_kv_head=2, n_layer=5, vocab_size=500
    )
    params = init_params(config, jax.random.key(7))
    leaves = {**params, **params["blocks"]}
    del leaves["blocks"]
    assert set(leaves) == set(INITIAL[era])
    for name, expected in INITIAL[era].items():
        value = np.asarray(leaves[name], np.float64)
        if not isinstance(expected, tuple):
            np.testing.assert_allclose(
                value, np.broadcast_to(expected, value.shape), rtol=1e-6, err_msg=name
            )
            continue
        if expected[0] == "normal":
            mean, std = 0.0, expected[1]
            assert 3.5 * std < np.abs(value).max() < 6.5 * std, name
            assert np.mean(np.abs(value) < std) == pytest.approx(0.6827, abs=0.01), name
        else:
            low, high = expected[1:]
            mean, std = (low + high) / 2, (high - low) / 12**0.5
            assert (
                low <= value.min() and value.max() <= high and np.ptp(value) > 0.8 * (high - low)
            ), name
        tolerance = 5 / value.size**0.5  # five standard errors
        assert value.mean() == pytest.approx(mean, abs=tolerance * std), name
        assert value.std() == pytest.approx(std, rel=tolerance), name


def test_initial_matrices_are_independent():
    params = init_params(dataclasses.replace(CONFIGS["modern"], n_embd=64), jax.random.key(7))
    matrices = [
        np.asarray(layer).ravel()[:2000]
        for name in ("c_q", "c_k", "c_v", "mlp_fc")
        for layer in params["blocks"][name]
    ] + [np.asarray(table).ravel()[:2000] for table in params["value_embeds"]]
    correlation = np.corrcoef([matrix - matrix.mean() for matrix in matrices]) - np.eye(
        len(matrices)
    )
    assert np.abs(correlation).max() < 0.15


@pytest.mark.parametrize(
    "change",
    [
        dict(n_head=3),
        dict(n_kv_head=3),
        dict(window_pattern="SX"),
        dict(n_layer=0),
        dict(n_embd=16),
    ],
)
def test_impossible_shapes_are_refused_with_the_value(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        dataclasses.replace(CONFIGS["modern"], **change)


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_every_declared_weight_is_used(arch):
    shape = dict(vocab_size=32, sequence_len=16, n_embd=32, n_head=2, n_kv_head=2)
    config = getattr(GPTConfig, arch)(4, **shape)
    shapes = weights.abstract_params(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), shapes)
    tokens = jnp.asarray(rng.integers(0, 32, (2, 16)))

    @jax.jit
    def gradients(params):
        def total(params):
            hidden, _ = forward(params, tokens, config)
            return jnp.sum(unembed(params, hidden, config=config)[..., ::2])

        return jax.grad(total)(params)

    unused = [
        jax.tree_util.keystr(path)
        for path, gradient in jax.tree.leaves_with_path(gradients(params))
        if not np.any(gradient)
    ]
    assert not unused

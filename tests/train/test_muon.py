"""Muon against optax's where they agree, on any mesh, and its known properties."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.model.weights import abstract_params
from nanochat_jax.train.muon import (
    NEWTON_SCHULZ,
    muon,
    normalize_variance,
    orthogonalize_classic,
    orthogonalize_modern,
)
from nanochat_jax.train.optim import (
    OptimizerConfig,
    Schedules,
    constant,
    cosine_decay,
    linear_momentum,
    make_optimizer,
    modern_momentum,
    trapezoid,
)

SHAPES = {
    "wide": (32, 128),
    "tall": (128, 32),
    "square": (48, 48),
    "stack": (3, 32, 128),
    "gate": (2, 12, 4),
}


@pytest.fixture(scope="module")
def matrices():
    """Parameters and the gradients of four steps."""
    keys = jax.random.split(jax.random.key(0), 5)
    trees = [
        {
            name: jax.random.normal(jax.random.fold_in(key, i), shape)
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        for key in keys
    ]
    return trees[0], trees[1:]


def run(transform, params, gradients, place=lambda tree: tree):
    params = place(params)
    state = transform.init(params)
    step = jax.jit(transform.update)
    for gradient in gradients:
        updates, state = step(place(gradient), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_the_first_classic_step_equals_that_of_optax(matrices, momentum):
    """Later ones differ: optax corrects the bias of the momentum."""
    params, gradients = matrices
    gradients = gradients if momentum == 0.0 else gradients[:1]
    dimensions = jax.tree.map(
        lambda p: optax.contrib.MuonDimensionNumbers(p.ndim - 2, p.ndim - 1), params
    )
    theirs = optax.contrib.muon(
        0.02,
        ns_coeffs=NEWTON_SCHULZ[0],
        beta=momentum,
        eps=1e-7,
        nesterov=True,
        muon_weight_dimension_numbers=dimensions,
    )
    ours = muon(constant(0.02), constant(momentum), variant="classic")
    expected = run(theirs, params, gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
        run(ours, params, gradients),
        expected,
    )


@pytest.mark.parametrize("variant", ["classic", "modern"])
@pytest.mark.parametrize("layout", ["8x1", "4x2"])
def test_a_mesh_does_not_change_the_result(matrices, variant, layout):
    params, gradients = matrices
    mesh = make_mesh(layout)
    options = dict(
        learning_rate=constant(0.02),
        momentum=linear_momentum(300, 0.85, 0.95),
        weight_decay=cosine_decay(0.3, 4) if variant == "modern" else None,
        variant=variant,
    )
    replicated = jax.NamedSharding(mesh, jax.P())
    alone = run(muon(**options), params, gradients)
    spread = run(
        muon(**options, mesh=mesh), params, gradients, lambda tree: jax.device_put(tree, replicated)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), spread, alone)


def test_on_a_mesh_each_device_orthogonalises_its_share():
    params = {"matrices": jnp.ones((16, 64, 256))}
    mesh = make_mesh("8x1")

    def flops(transform):
        step = jax.jit(transform.update).lower(params, transform.init(params), params).compile()
        return step.cost_analysis()["flops"]

    options = dict(learning_rate=constant(0.02), momentum=constant(0.9), variant="modern")
    assert flops(muon(**options, mesh=mesh)) < flops(muon(**options)) / 4


def test_matrices_of_a_stack_are_as_if_alone(matrices):
    params, gradients = matrices
    together = run(muon(constant(0.02), constant(0.9), variant="modern"), params, gradients)[
        "stack"
    ]
    for i in range(3):
        alone = run(
            muon(constant(0.02), constant(0.9), variant="modern"),
            {"one": params["stack"][i]},
            [{"one": gradient["stack"][i]} for gradient in gradients],
        )["one"]
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("orthogonalize", [orthogonalize_classic, orthogonalize_modern])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (96, 96)])
def test_singular_values_come_near_one(orthogonalize, shape):
    update = 37.0 * jax.random.normal(jax.random.key(1), (1, *shape))
    values = np.linalg.svd(np.asarray(orthogonalize(update, jnp.float32))[0], compute_uv=False)
    assert values.max() < 1.35 and values.max() / np.percentile(values, 10) < 4
    assert np.sqrt((values**2).mean()) == pytest.approx(1.0, abs=0.15)


def test_a_matrix_with_more_outputs_than_inputs_takes_a_longer_step():
    """sqrt(out / in)."""
    transform = muon(constant(1.0), constant(0.0), variant="classic")
    params = {"up": jnp.zeros((16, 64)), "down": jnp.zeros((64, 16))}
    gradient = jax.random.normal(jax.random.key(2), (16, 64))
    updates, _ = transform.update(
        {"up": gradient, "down": gradient.T}, transform.init(params), params
    )
    np.testing.assert_allclose(updates["up"], 2.0 * updates["down"].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_variance_is_per_output_or_per_input_and_keeps_the_norm(shape):
    """Per output where there are as many outputs as inputs or more, else per input."""
    update = jax.random.normal(jax.random.key(3), (1, *shape)) * jnp.arange(1, shape[1] + 1)
    moment = jnp.zeros((1, 1, shape[1]) if shape[1] >= shape[0] else (1, shape[0], 1))
    normalized, moment = normalize_variance(update, moment, 0.0)
    assert np.linalg.norm(normalized) == pytest.approx(np.linalg.norm(update), rel=1e-5)
    squares = np.square(np.asarray(normalized)).mean(axis=1 if shape[1] >= shape[0] else 2)
    np.testing.assert_allclose(squares, squares.mean(), rtol=1e-4)


def test_decay_is_cautious():
    params = {"w": jnp.where(jax.random.bernoulli(jax.random.key(4), 0.5, (24, 24)), 5.0, -5.0)}
    gradient = {"w": jax.random.normal(jax.random.key(5), (24, 24))}

    def step(decay):
        transform = muon(constant(0.1), constant(0.0), constant(decay), variant="modern")
        return np.asarray(transform.update(gradient, transform.init(params), params)[0]["w"])

    plain, difference = step(0.0), step(0.5) - step(0.0)
    agree = -plain * np.asarray(params["w"]) >= 0
    np.testing.assert_allclose(
        difference[agree], (-0.1 * 0.5 * np.asarray(params["w"]))[agree], rtol=1e-4
    )
    assert (difference[~agree] == 0).all() and 0 < agree.sum() < agree.size


def test_schedules_have_upstreams_values_at_their_corners():
    classic = trapezoid(1000, warmup=0, warmdown_ratio=0.2, final_fraction=0.0)
    assert [float(classic(step)) for step in (0, 800, 900, 999)] == pytest.approx(
        [1.0, 1.0, 0.5, 0.005]
    )
    modern = trapezoid(1000, warmup=40, warmdown_ratio=0.65, final_fraction=0.05)
    assert [float(modern(step)) for step in (0, 39, 40, 350, 675)] == pytest.approx(
        [0.025, 1.0, 1.0, 1.0, 0.525]
    )
    assert float(modern(999)) == pytest.approx(1 / 650 + (649 / 650) * 0.05)
    ramp = linear_momentum(300, 0.85, 0.95)
    assert [float(ramp(step)) for step in (0, 150, 300, 900)] == pytest.approx(
        [0.85, 0.90, 0.95, 0.95]
    )
    late = modern_momentum(2000, 0.65)
    assert [float(late(step)) for step in (0, 200, 400, 700, 1350)] == pytest.approx(
        [0.85, 0.91, 0.97, 0.97, 0.935]
    )
    decay = cosine_decay(0.28, 400)
    assert [float(decay(step)) for step in (0, 100, 200, 400)] == pytest.approx(
        [0.28, 0.28 * 0.853553, 0.14, 0.0], abs=1e-6
    )


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_weight_decay_of_the_rates_is_for_classic_only(arch):
    config = getattr(GPTConfig, arch)(1, n_embd=32, n_head=1, n_kv_head=1, vocab_size=64)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_params(config))

    def update(weight_decay):
        schedules = Schedules(lr_multiplier=constant(1.0), momentum=constant(0.9))
        rates = OptimizerConfig(weight_decay=weight_decay)
        optimizer = make_optimizer(config, rates, schedules)
        return jax.jit(optimizer.update)(params, optimizer.init(params), params)[0]

    same = jax.tree.map(lambda a, b: bool((a == b).all()), update(0.0), update(0.5))
    matrices = all(jax.tree.leaves(same["blocks"]))
    assert matrices and same["wte"] == same["lm_head"] == (arch == "modern")

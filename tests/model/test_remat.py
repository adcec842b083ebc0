"""Gradients do not depend on what is recomputed nor on loops over layers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_gpt import CONFIGS, random_params, random_tokens

from nanochat_jax.model.compute import REMAT, Compute
from nanochat_jax.model.gpt import forward, layer_groups
from nanochat_jax.model.weights import init_params


@functools.partial(jax.jit, static_argnames=("config", "how"))
def cubic_gradient(params, tokens, config, how):
    return jax.grad(lambda p: (forward(p, tokens, config, how)[0] ** 3).sum())(params)


@pytest.mark.parametrize("remat", REMAT[1:])
@pytest.mark.parametrize("era", CONFIGS)
def test_rematerialised_gradients_equal_plain_ones(era, remat):
    config = CONFIGS[era]
    params, tokens = random_params(config), random_tokens(config, 1, 20)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        cubic_gradient(params, tokens, config, Compute(remat=remat)),
        cubic_gradient(params, tokens, config, Compute(remat="none")),
    )


@pytest.mark.parametrize(
    "era, depth, groups, remat",
    [
        *(("classic", 4, (1, 4), remat) for remat in REMAT),
        ("modern", 8, (4, 2), "minimal"),
        *(
            pytest.param("modern", 8, (4, 2), r, marks=pytest.mark.slow)
            for r in REMAT
            if r != "minimal"
        ),
        ("modern", 9, (4, 2), "none"),
        *(pytest.param("modern", 9, (4, 2), r, marks=pytest.mark.slow) for r in REMAT[1:]),
    ],
)
def test_a_loop_over_groups_of_layers_equals_the_layers_one_by_one(era, depth, groups, remat):
    """Groups of the window pattern's length; of nine layers the last stands alone."""
    config = dataclasses.replace(CONFIGS[era], n_layer=depth)
    assert layer_groups(config, scan=True, keep_few=False) == groups
    params, tokens = random_params(config), random_tokens(config, 1, 150)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()),
        cubic_gradient(params, tokens, config, Compute(scan=True, remat=remat)),
        cubic_gradient(params, tokens, config, Compute()),
    )


def test_rematerialisation_keeps_fewer_activations_for_the_backward_pass():
    config = dataclasses.replace(CONFIGS["modern"], n_layer=9)
    params, tokens = init_params(config, jax.random.key(0)), random_tokens(config, 4, 64)

    def kept(remat):
        run = lambda p: forward(p, tokens, config, Compute(remat=remat))[0]  # noqa: E731
        backward = jax.eval_shape(lambda p: jax.vjp(run, p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept("none") > 1.5 * kept("minimal") > 2 * kept("block") > 2 * kept("full")

"""Weights as inference stores them compute what the plain formulas compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model import fast, layers
from nanochat_jax.model.fast import lookup
from nanochat_jax.model.rows import FEWEST_VECTORS, Rows, as_table

TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8}


def normal(seed, *shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, FEWEST_VECTORS - 1, FEWEST_VECTORS, 17])
def test_a_linear_layer_by_rows_is_the_plain_one(dtype, tokens):
    x, weight = normal(0, 1, tokens, 24, dtype=dtype), normal(1, 24, 40, dtype=dtype)
    heads = normal(2, 1, tokens, 4, 6, dtype=dtype)
    for out, plain in (
        (fast.linear(x, Rows.of(weight)), layers.linear(x, weight)),
        # queries: the result has an axis of heads
        (
            fast.linear(x, Rows.of(weight).reshape(24, -1, 8)),
            layers.linear(x, weight.reshape(24, 5, 8)),
        ),
        # the output projection: heads and head width are summed over
        (
            fast.linear(heads, Rows.of(weight).reshape(4, 6, -1), axes=2),
            layers.linear(heads, weight.reshape(4, 6, 40), axes=2),
        ),
    ):
        assert out.dtype == plain.dtype and out.shape == plain.shape
        scale = float(jnp.abs(plain).max())
        np.testing.assert_allclose(
            np.float32(out), np.float32(plain), atol=TOLERANCE[dtype] * scale, rtol=0
        )


def test_a_table_by_bits_has_the_same_rows():
    table = normal(3, 50, 8, dtype="bfloat16")
    tokens = jnp.array([[0, 49, 7]])
    stored = as_table(table)
    assert stored.dtype == jnp.uint16
    np.testing.assert_array_equal(lookup(stored, tokens, jnp.bfloat16), table[tokens])
    np.testing.assert_array_equal(lookup(table, tokens, jnp.float32), table[tokens])

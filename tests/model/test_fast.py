"""The forms that XLA runs fastest compute what the plain formulas do, in value and in gradient."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model import fast, layers

RNG = np.random.default_rng(0)
POSITIONS = jnp.arange(6)[None] + jnp.array([[0], [3]])
TABLES = layers.rotary_tables(POSITIONS, 8, 100.0, "float32")
ONE = tuple(table[:, :1] for table in TABLES)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# name: (plain, fast, differentiable arguments)
PAIRS = {
    "linear": (layers.linear, fast.linear, (draw(2, 5, 6), draw(6, 9))),
    "linear to heads": (layers.linear, fast.linear, (draw(2, 5, 6), draw(6, 3, 4))),
    "linear from heads": (
        lambda x, w: layers.linear(x, w, 2),
        lambda x, w: fast.linear(x, w, 2),
        (draw(2, 5, 3, 4), draw(3, 4, 6)),
    ),
    "unsaved_linear": (layers.linear, fast.unsaved_linear, (draw(2, 5, 6), draw(6, 9))),
    "lookup": (
        lambda table: table[jnp.array([[0, 3, 3], [1, 0, 3]])],
        lambda table: fast.lookup(table, jnp.array([[0, 3, 3], [1, 0, 3]]), jnp.dtype("float32")),
        (draw(5, 4),),
    ),
    "transpose": (lambda x: x.swapaxes(-1, -2), fast.transpose, (draw(3, 4, 5),)),
    "matmul_transposed, narrow": (
        lambda x, y: x.T @ y,
        fast.matmul_transposed,
        (draw(7, 3), draw(7, 5)),
    ),
    "matmul_transposed, wide": (
        lambda x, y: x.T @ y,
        fast.matmul_transposed,
        (draw(7, 5), draw(7, 3)),
    ),
    "apply_rotary": (
        lambda x: layers.apply_rotary(x, *TABLES),
        lambda x: fast.apply_rotary(x, *TABLES),
        (draw(2, 6, 3, 8),),
    ),
    "apply_rotary of one token": (
        lambda x: layers.apply_rotary(x, *ONE),
        lambda x: fast.apply_rotary(x, *ONE),
        (draw(2, 1, 3, 8),),
    ),
    "rotary_norm": (
        lambda x: layers.rotary_norm(x, *TABLES, 1.2),
        lambda x: fast.rotary_norm(x, *TABLES, 1.2),
        (draw(2, 6, 3, 8),),
    ),
    "squared_relu": (layers.squared_relu, fast.squared_relu, (draw(50),)),
    "mlp": (layers.mlp, fast.mlp, (draw(2, 5, 4), draw(4, 16), draw(16, 4))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_value_and_gradient_equal_the_plain_formula(name):
    plain, quick, arguments = PAIRS[name]
    expected, backward = jax.vjp(plain, *arguments)
    found, found_backward = jax.vjp(jax.jit(quick), *arguments)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    cotangent = draw(*expected.shape)
    for mine, theirs in zip(found_backward(cotangent), backward(cotangent), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_every_function_of_the_module_is_compared():
    public = {
        name
        for name, value in vars(fast).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == fast.__name__
    }
    assert public == {name.split(",")[0].split(" ")[0] for name in PAIRS}


def test_both_forms_take_the_same_arguments():
    """But for the precision of training, which plain formulas do not have."""
    for name, plain in inspect.getmembers(layers, inspect.isfunction):
        if hasattr(fast, name):
            names = [*inspect.signature(getattr(fast, name)).parameters]
            assert [*inspect.signature(plain).parameters] == [
                name for name in names if name != "precision"
            ], name


def test_the_gradient_of_a_bfloat16_table_is_summed_in_float32():
    tokens, table = jnp.zeros((1, 1000), jnp.int32), jnp.ones((2, 1), jnp.bfloat16)
    total = lambda table: fast.lookup(table, tokens, jnp.dtype("bfloat16")).sum()  # noqa: E731
    gradient = jax.grad(total)(table)
    assert gradient.dtype == jnp.bfloat16 and gradient[0, 0] == 1000 and gradient[1, 0] == 0

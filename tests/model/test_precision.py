"""Float8 and int8 matmuls: their error, their range, and that no mesh changes them."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nanochat_jax.errors import UsageError
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.layers import linear
from nanochat_jax.model.loss import Batch, token_nll
from nanochat_jax.model.precision import check_units, has_units, low_precision_matmul
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.model.weights import init_params
from nanochat_jax.train.config import RunConfig

RNG = np.random.default_rng(0)
LOW = ("fp8", "fp8_rowwise", "int8")
# A value rounded to m bits of mantissa is off by about 2^-m / 4.6 (e4m3: 3, e5m2: 2). A normal row
# of 256 in 127 steps up to its largest, 2.9 sigma, is off by 2.9 / 127 / sqrt(12).
E4M3, E5M2, INT8 = 2**-3 / 4.6, 2**-2 / 4.6, 2.9 / 127 / 12**0.5
# Expected relative error of the result, the data gradient and the weight gradient.
ERRORS = {
    "fp8": [np.hypot(E4M3, E4M3), np.hypot(E5M2, E4M3), np.hypot(E4M3, E5M2)],
    "int8": [np.hypot(INT8, INT8), np.hypot(INT8, INT8), 0.0],
}
ERRORS["fp8_rowwise"] = ERRORS["fp8"]


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def products(f, x, weight, d_out):
    """[result, data gradient, weight gradient] of a linear layer."""
    out, backward = jax.vjp(jax.jit(f), x, weight)
    return [np.asarray(y) for y in (out, *backward(d_out))]


def low(precision, axes=1):
    return lambda x, weight: low_precision_matmul(x, weight, axes, precision)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("heads", ["", "to", "from"])
def test_each_matmul_is_off_by_what_its_types_imply_and_unbiased(precision, heads):
    shapes, axes = ((4, 64, 256), (256, 512), (4, 64, 512)), 1
    if heads == "to":
        shapes = ((4, 64, 256), (256, 4, 128), (4, 64, 4, 128))
    elif heads == "from":
        shapes, axes = ((4, 64, 4, 64), (4, 64, 512), (4, 64, 512)), 2
    arguments = [draw(*shape) for shape in shapes]
    exact = products(lambda x, weight: linear(x, weight, axes), *arguments)
    found = products(low(precision, axes), *arguments)
    for mine, true, expected in zip(found, exact, ERRORS[precision], strict=True):
        error = np.linalg.norm(mine - true) / np.linalg.norm(true)
        assert 0.7 * expected <= error <= 1.3 * expected + 1e-6
        # The share of the true result in the rounded one. Rounding to the nearest value shrinks
        # normal entries by 0.08% in e4m3 and 0.28% in e5m2; rounding to zero by 5% or more.
        assert np.vdot(mine, true) / np.vdot(true, true) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("x, weight, d_out", [(1e30, 1e-30, 1), (1e-25, 1, 1e-20), (1, 1, 1e25)])
def test_huge_and_tiny_tensors_lose_nothing(precision, x, weight, d_out):
    arguments = draw(2, 16, 128), draw(128, 128), draw(2, 16, 128)
    scales = x, weight, d_out
    plain = products(low(precision), *arguments)
    found = products(low(precision), *(a * s for a, s in zip(arguments, scales, strict=True)))
    factors = x * weight, d_out * weight, x * d_out
    for mine, same, factor in zip(found, plain, factors, strict=True):
        assert np.isfinite(mine).all()
        if 1e-30 < factor:  # smaller results are below float32
            np.testing.assert_allclose(mine / factor, same, atol=0.02 * np.abs(same).max())


@pytest.mark.parametrize("precision", LOW)
def test_zeros_stay_zeros_and_infinity_is_not_hidden(precision):
    x, weight, d_out = draw(2, 16, 128), draw(128, 128), draw(2, 16, 128)
    for y in products(low(precision), 0 * x, 0 * weight, 0 * d_out):
        assert not y.any()
    # int8 has no NaN; the residual stream, which is not rounded, takes it to the loss
    for bad in (jnp.inf,) if precision == "int8" else (jnp.inf, jnp.nan):
        out = low_precision_matmul(x.at[0, 0, 0].set(bad), weight, 1, precision)
        assert not np.isfinite(out[0, 0]).any()


@pytest.mark.parametrize("precision", LOW)
def test_scales_are_those_of_the_complete_tensor_on_every_mesh(precision):
    mesh = make_mesh("4x2")
    # each data shard and each model shard has another largest entry
    rows, columns = 4.0 ** jnp.arange(8)[:, None, None], 1.0 + jnp.arange(128) % 17
    x, weight = draw(8, 16, 256) * rows, draw(256, 128) * columns
    d_out = draw(8, 16, 128) * rows

    def run(x, weight, d_out):
        out, backward = jax.vjp(low(precision), x, weight)
        return out, *backward(d_out)

    def shard(x, weight, d_out):
        out, d_x, d_weight = run(x, weight, d_out)
        return out, d_x, jax.lax.psum(d_weight, "data")

    data, replica = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(data, replica, data),
        out_specs=(data, data, replica),
        axis_names={"data"},
        check_vma=False,
    )
    place = lambda y, *axes: jax.device_put(y, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    found = jax.jit(sharded)(
        place(x, "data"), place(weight, None, "model"), place(d_out, "data", None, "model")
    )
    for mine, alone in zip(found, jax.jit(run)(x, weight, d_out), strict=True):
        np.testing.assert_allclose(mine, alone, rtol=1e-5, atol=1e-6 * np.abs(alone).max())


def low_matmuls(jaxpr):
    """Number of matmuls with operands of one byte in a jaxpr."""
    inner = [
        getattr(part, "jaxpr", part)
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        for part in (value if isinstance(value, tuple | list) else (value,))
    ]
    return sum(
        eqn.primitive.name == "dot_general" and eqn.invars[0].aval.dtype.itemsize == 1
        for eqn in jaxpr.eqns
    ) + sum(low_matmuls(part) for part in inner if hasattr(part, "eqns"))


@pytest.mark.parametrize("precision, matmuls", [("bf16", 0), ("fp8", 3), ("int8", 2)])
def test_only_the_six_matrices_of_a_layer_are_rounded(precision, matmuls):
    """Not the gates, which are too small, nor the embeddings and the unembedding."""
    config = GPTConfig.modern(2, head_dim=64, sequence_len=32, vocab_size=128)
    compute = Compute(dtype=jnp.bfloat16, precision=precision)
    tokens = jnp.zeros((2, 32), jnp.int32)
    loss = lambda params: token_nll(params, Batch(tokens, tokens), config, compute)[0]  # noqa: E731
    params = init_params(config, jax.random.key(0))
    assert low_matmuls(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) == 6 * 2 * matmuls
    narrow = GPTConfig.modern(1, head_dim=32, sequence_len=32, vocab_size=128)  # width 64
    params = init_params(narrow, jax.random.key(0))
    loss = functools.partial(token_nll, config=narrow, compute=compute)
    jaxpr = jax.make_jaxpr(lambda p: loss(p, Batch(tokens, tokens))[0])(params).jaxpr
    assert low_matmuls(jaxpr) == 0


def device(kind, platform="gpu", **attributes):
    return SimpleNamespace(device_kind=kind, platform=platform, **attributes)


@pytest.mark.parametrize(
    "chip, precisions",
    [
        (device("NVIDIA H100 80GB HBM3", compute_capability="9.0"), {"fp8", "fp8_rowwise"}),
        (device("NVIDIA L4", compute_capability="8.9"), {"fp8", "fp8_rowwise"}),
        (device("NVIDIA A100-SXM4-80GB", compute_capability="8.0"), set()),
        (device("AMD Instinct MI300X", compute_capability="gfx942"), set()),
        (device("TPU v5 lite", "tpu"), {"int8"}),
        (device("TPU v6 lite", "tpu"), {"int8"}),
        (device("TPU v4", "tpu"), set()),
        (device("TPU7x", "tpu"), {"fp8", "fp8_rowwise"}),
        (device("cpu", "cpu"), set()),
    ],
)
def test_a_chip_without_units_refuses_and_a_cpu_emulates(chip, precisions):
    assert {name for name in LOW if has_units(name, chip)} == precisions
    assert has_units("bf16", chip)
    for name in LOW:
        if name in precisions or chip.platform == "cpu":
            check_units(name, chip)
        else:
            with pytest.raises(UsageError, match=f"`precision={name[:3]}.*use `precision=bf16`"):
                check_units(name, chip)


@pytest.mark.parametrize(
    "flags, precision",
    [
        ({}, "bf16"),
        ({"fp8": True}, "fp8"),
        ({"precision": "fp8", "fp8_recipe": "rowwise"}, "fp8_rowwise"),
        ({"precision": "int8"}, "int8"),
        ({"precision": "int8", "fp8": True}, None),
        ({"fp8_recipe": "rowwise"}, None),
    ],
)
def test_the_flags_of_upstream_select_the_precision(flags, precision):
    if precision is None:
        with pytest.raises(ValueError, match="fp8"):
            RunConfig(**flags)
    else:
        assert RunConfig(**flags).step_precision == precision

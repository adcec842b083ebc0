"""The functions of `layers.py` in the forms that XLA runs fastest: same values, hand-written
gradients.

Results marked `checkpoint_name(x, SAVED)` are saved for the backward pass under `remat="minimal"`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from nanochat_jax.model.layers import RMS_EPS, rms_norm
from nanochat_jax.model.layers import apply_rotary as plain_rotary
from nanochat_jax.model.precision import low_precision_matmul, suits
from nanochat_jax.model.rows import Rows

SAVED = "saved"  # `jax.checkpoint`'s name for results that are expensive to recompute


def linear(x: Array, weight: Array | Rows, axes: int = 1, precision: str = "bf16") -> Array:
    """`layers.linear`; the result is `SAVED`. In low `precision` where the sizes of a weight allow.

    Why: on a CPU, the operands of the backward pass are row-major (2x in float32, 4x in bfloat16).
    On a TPU, heads are an axis of the result, and attention reads them without a copy.
    """
    return checkpoint_name(unsaved_linear(x, weight, axes, precision), SAVED)


def unsaved_linear(x: Array, weight: Array | Rows, axes: int = 1, precision: str = "bf16") -> Array:
    """`linear`, but the result is not `SAVED`."""
    if isinstance(weight, Rows):
        return weight.linear(x, axes)
    weight = weight.astype(x.dtype)
    if precision == "bf16" or not suits(weight, axes):
        return _linear(x, weight, axes)
    return low_precision_matmul(x, weight, axes, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: Array, tokens: Array, dtype: jnp.dtype) -> Array:
    """The rows of `table` [V, D] for tokens [B, T], in `dtype`: [B, T, D].

    A table of uint16 has the bits of bfloat16 (`rows.as_table`); it is not differentiated.

    Why: the gradient of a bfloat16 table is summed in float32. In bfloat16, a sum of equal terms
    stops growing at 256 of them, and frequent tokens have more.
    """
    rows = table[tokens]
    if table.dtype == jnp.uint16:
        rows = jax.lax.bitcast_convert_type(rows, jnp.bfloat16)
    return rows.astype(dtype)


def _lookup_bwd(dtype: jnp.dtype, saved: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    table, tokens = saved
    summed = jnp.zeros(table.shape, jnp.float32).at[tokens].add(d_rows.astype(jnp.float32))
    return summed.astype(table.dtype), None


lookup.defvjp(
    lambda table, tokens, dtype: (lookup(table, tokens, dtype), (table, tokens)), _lookup_bwd
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: Array, weight: Array, axes: int) -> Array:
    def flat(x: Array, weight: Array) -> Array:
        rows = weight.reshape(math.prod(weight.shape[:axes]), -1)
        out = jnp.dot(_flatten(x, axes), rows, preferred_element_type=jnp.float32)
        return out.reshape(*x.shape[: x.ndim - axes], *weight.shape[axes:]).astype(x.dtype)

    def direct(x: Array, weight: Array) -> Array:
        return jnp.tensordot(x, weight, axes, preferred_element_type=jnp.float32).astype(x.dtype)

    if weight.ndim == 2:
        return direct(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=flat, default=direct)


def _linear_bwd(axes: int, residuals: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    def flat(x: Array, weight: Array, d_out: Array) -> tuple[Array, Array]:
        x_rows, d_rows = _flatten(x, axes), _flatten(d_out, weight.ndim - axes)
        fan_in, fan_out = x_rows.shape[-1], d_rows.shape[-1]
        columns = transpose(weight.reshape(fan_in, fan_out))
        d_x = jnp.dot(d_rows, columns, preferred_element_type=jnp.float32)
        d_weight = matmul_transposed(x_rows.reshape(-1, fan_in), d_rows.reshape(-1, fan_out))
        return d_x.reshape(x.shape).astype(x.dtype), d_weight.reshape(weight.shape).astype(
            weight.dtype
        )

    def direct(x: Array, weight: Array, d_out: Array) -> tuple[Array, Array]:
        batch, out = range(x.ndim - axes), range(axes, weight.ndim)
        matmul = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        d_x = matmul(d_out, weight, ((range(len(batch), d_out.ndim), out), ((), ())))
        d_weight = matmul(x, d_out, ((batch, batch), ((), ())))
        return d_x.astype(x.dtype), d_weight.astype(weight.dtype)

    return jax.lax.platform_dependent(*residuals, d_out, cpu=flat, default=direct)


_linear.defvjp(lambda x, weight, axes: (_linear(x, weight, axes), (x, weight)), _linear_bwd)


def _flatten(x: Array, axes: int) -> Array:
    """The last `axes` axes of x as one."""
    return x.reshape(*x.shape[: x.ndim - axes], -1)


def transpose(x: Array) -> Array:
    """x [..., R, C] -> [..., C, R], on a CPU as a copy.

    Why: XLA's CPU matmul is twice as fast if both operands are row-major (four times in bfloat16,
    where it otherwise computes in float32). XLA folds a plain transpose into the matmul by changing
    the layout. The `where`, which XLA simplifies away later, and the barrier prevent that.
    """

    def copy(x: Array) -> Array:
        turned = x.swapaxes(-1, -2)
        return jax.lax.optimization_barrier(jnp.where(jnp.ones(turned.shape, bool), turned, 0))

    return jax.lax.platform_dependent(x, cpu=copy, default=lambda x: x.swapaxes(-1, -2))


def matmul_transposed(x: Array, y: Array) -> Array:
    """x^T y in float32: [M, N] of x [R, M] and y [R, N]."""
    if x.shape[1] <= y.shape[1]:
        return jnp.dot(transpose(x), y, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(
        jnp.dot(transpose(y), x, preferred_element_type=jnp.float32)
    ).T


def apply_rotary(x: Array, cos: Array, sin: Array) -> Array:
    """`layers.apply_rotary`.

    Why: one multiply-add over full rows replaces slices and a concatenation. When decoding (T = 1),
    the number of kernels matters more than the bytes, so the plain form is faster.
    """
    if x.shape[1] == 1:
        return plain_rotary(x, cos, sin)
    return (x.astype(jnp.float32) * cos + _swap_halves(x).astype(jnp.float32) * sin).astype(x.dtype)


def _swap_halves(x: Array) -> Array:
    """[a, b] -> [b, a] along the last axis; on a TPU an exact matmul with a permutation.

    Why: XLA writes slices of half a row of lanes to memory, each padded to a full row. A matmul
    fuses with its neighbours.
    """
    half = x.shape[-1] // 2

    def matmul(x: Array) -> Array:
        swap = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=1)
        out = jnp.dot(
            x, swap, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        return out.astype(x.dtype)

    return jax.lax.platform_dependent(x, tpu=matmul, default=lambda x: jnp.roll(x, half, axis=-1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def rotary_norm(x: Array, cos: Array, sin: Array, scale: float) -> Array:
    """`layers.rotary_norm`.

    Why: the gradient needs only the result and the norms, so a backward pass that recomputes
    activations neither rotates nor normalizes again.
    """
    return rms_norm(apply_rotary(x, cos, sin)) * scale


def _rotary_norm_fwd(x: Array, cos: Array, sin: Array, scale: float) -> tuple[Array, tuple]:
    turned = apply_rotary(x, cos, sin)
    x32 = turned.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + RMS_EPS)
    out = checkpoint_name((x32 * inverse).astype(x.dtype) * scale, SAVED)
    return out, (out, checkpoint_name(inverse[..., 0], SAVED), cos, sin)


def _rotary_norm_bwd(scale: float, residuals: tuple, d_out: Array) -> tuple[Array, None, None]:
    out, inverse, cos, sin = residuals
    unit, d_unit = out.astype(jnp.float32) / scale, d_out.astype(jnp.float32) * scale
    d_turned = inverse[..., None] * (
        d_unit - unit * jnp.mean(d_unit * unit, axis=-1, keepdims=True)
    )
    return apply_rotary(d_turned.astype(out.dtype), cos, -sin), None, None  # rotated back


rotary_norm.defvjp(_rotary_norm_fwd, _rotary_norm_bwd)


@jax.custom_jvp
def squared_relu(x: Array) -> Array:
    """`layers.squared_relu`.

    Why: the derivative needs no mask of x > 0, which XLA would write to memory.
    """
    return jnp.square(jnp.maximum(x, 0))


@squared_relu.defjvp
def _squared_relu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (t,) = primals, tangents
    return squared_relu(x), 2 * jnp.maximum(x, 0) * t


def mlp(x: Array, mlp_fc: Array | Rows, mlp_proj: Array | Rows, precision: str = "bf16") -> Array:
    """`layers.mlp`.

    Why: the hidden layer [B, T, F] is not `SAVED`: on a TPU, recomputing it is cheaper than an HBM
    round trip.
    """
    hidden = squared_relu(unsaved_linear(x, mlp_fc, precision=precision))
    return linear(hidden, mlp_proj, precision=precision)

"""The small parts of the transformer: norm, linear, rotary embedding, MLP. Pure functions of arrays.

Matrices are stored [in, out] in float32 and cast to the dtype of the activations; products accumulate in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"  # name of what is dear to recompute, for `jax.checkpoint`
RMS_EPS = 1.1920929e-07  # float32 machine epsilon, torch's default for every input dtype


def rms_norm(x: Array) -> Array:
    """Root-mean-square norm over the last axis without a gain (Zhang and Sennrich, 2019), computed in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + RMS_EPS)).astype(x.dtype)


def linear(x: Array, weight: Array, axes: int = 1) -> Array:
    """x [..., in] times weight [in, out], in the dtype of x with float32 accumulation, backward too.

    in and out may be several axes each, in being the last `axes` of x: on a TPU heads that are an axis of the product's result
    are written the way that attention reads them, while a reshape asks for a copy.
    """
    return checkpoint_name(_linear(x, weight.astype(x.dtype), axes), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: Array, weight: Array, axes: int) -> Array:
    def rows(x: Array, weight: Array) -> Array:
        out = jnp.dot(_flat(x, axes), weight.reshape(math.prod(weight.shape[:axes]), -1), preferred_element_type=jnp.float32)
        return out.reshape(*x.shape[: x.ndim - axes], *weight.shape[axes:]).astype(x.dtype)

    def direct(x: Array, weight: Array) -> Array:
        return jnp.tensordot(x, weight, axes, preferred_element_type=jnp.float32).astype(x.dtype)

    return direct(x, weight) if weight.ndim == 2 else jax.lax.platform_dependent(x, weight, cpu=rows, default=direct)


def _flat(x: Array, axes: int) -> Array:
    """The last `axes` axes of x as one."""
    return x.reshape(*x.shape[: x.ndim - axes], -1)


def transpose(x: Array) -> Array:
    """x [..., R, C] -> [..., C, R], on a CPU as a copy.

    XLA's CPU matrix product is twice as fast (in bfloat16 four times: otherwise it computes in float32) if both operands lie
    row by row. But it makes a transpose part of the product, by changing the layout, unless the result has a layout of its own
    (the `where`, later simplified away) and is kept from being merged (the barrier).
    """
    def copy(x: Array) -> Array:
        turned = x.swapaxes(-1, -2)
        return jax.lax.optimization_barrier(jnp.where(jnp.ones(turned.shape, bool), turned, 0))

    return jax.lax.platform_dependent(x, cpu=copy, default=lambda x: x.swapaxes(-1, -2))


def product_transposed(x: Array, y: Array) -> Array:
    """x^T y in float32, [M, N] of x [R, M] and y [R, N]; the narrower one is what gets transposed."""
    if x.shape[1] <= y.shape[1]:
        return jnp.dot(transpose(x), y, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(jnp.dot(transpose(y), x, preferred_element_type=jnp.float32)).T


def _linear_bwd(axes: int, residuals: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    def rows(x: Array, weight: Array, d_out: Array) -> tuple[Array, Array]:
        flat, d_flat = _flat(x, axes), _flat(d_out, weight.ndim - axes)
        d_x = jnp.dot(d_flat, transpose(weight.reshape(flat.shape[-1], -1)), preferred_element_type=jnp.float32)
        d_weight = product_transposed(flat.reshape(-1, flat.shape[-1]), d_flat.reshape(-1, d_flat.shape[-1]))
        return d_x.reshape(x.shape).astype(x.dtype), d_weight.reshape(weight.shape).astype(weight.dtype)

    def direct(x: Array, weight: Array, d_out: Array) -> tuple[Array, Array]:
        leading, out = range(x.ndim - axes), range(axes, weight.ndim)
        product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        d_x = product(d_out, weight, ((range(len(leading), d_out.ndim), out), ((), ())))
        return d_x.astype(x.dtype), product(x, d_out, ((leading, leading), ((), ()))).astype(weight.dtype)

    return jax.lax.platform_dependent(*residuals, d_out, cpu=rows, default=direct)


_linear.defvjp(lambda x, weight, axes: (_linear(x, weight, axes), (x, weight)), _linear_bwd)


def rotary_tables(positions: Array, head_dim: int, base: float, dtype: str) -> tuple[Array, Array]:
    """Cosines and sines [B, T, 1, h] for positions [B, T], the sines of the second half negative; rounded to `dtype`,
    returned as float32."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    cos, sin = (table.astype(dtype).astype(jnp.float32)[:, :, None, :] for table in (jnp.cos(angles), jnp.sin(angles)))
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, -sin], axis=-1)


def apply_rotary(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding (Su et al., 2021) of x [B, T, H, h], halves layout, turning by the negative angle as upstream."""
    if x.shape[1] == 1:  # decoding, where the number of operations counts and not what they move
        half = x.shape[-1] // 2
        (x1, x2), cos, sin = jnp.split(x.astype(jnp.float32), 2, axis=-1), cos[..., :half], sin[..., :half]
        return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x.dtype)
    return (x.astype(jnp.float32) * cos + _swap_halves(x).astype(jnp.float32) * sin).astype(x.dtype)


def _swap_halves(x: Array) -> Array:
    """[a, b] -> [b, a] along the last axis. On a TPU as an exact product with a permutation: XLA writes slices that fill half
    of a row of lanes to memory, each in the place of a whole one, but makes a product part of what is around it."""
    half = x.shape[-1] // 2

    def product(x: Array) -> Array:
        swap = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=1)
        return jnp.dot(x, swap, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(x, tpu=product, default=lambda x: jnp.roll(x, half, axis=-1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def rotary_norm(x: Array, cos: Array, sin: Array, scale: float) -> Array:
    """scale * rms_norm(apply_rotary(x)): queries and keys [B, T, H, h] as attention takes them.

    Its gradient, written down, needs the result and the norms alone, so that a pass that recomputes activations keeps these
    and neither rotates nor norms again.
    """
    return rms_norm(apply_rotary(x, cos, sin)) * scale


def _rotary_norm_fwd(x: Array, cos: Array, sin: Array, scale: float) -> tuple[Array, tuple]:
    turned = apply_rotary(x, cos, sin)
    x32 = turned.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + RMS_EPS)
    out = checkpoint_name((x32 * inverse).astype(x.dtype) * scale, PRODUCT)
    return out, (out, checkpoint_name(inverse[..., 0], PRODUCT), cos, sin)


def _rotary_norm_bwd(scale: float, residuals: tuple, d_out: Array) -> tuple[Array, None, None]:
    out, inverse, cos, sin = residuals
    unit, d_unit = out.astype(jnp.float32) / scale, d_out.astype(jnp.float32) * scale
    d_turned = inverse[..., None] * (d_unit - unit * jnp.mean(d_unit * unit, axis=-1, keepdims=True))
    return apply_rotary(d_turned.astype(out.dtype), cos, -sin), None, None  # turned back


rotary_norm.defvjp(_rotary_norm_fwd, _rotary_norm_bwd)


@jax.custom_jvp
def squared_relu(x: Array) -> Array:
    """relu(x)^2 (So et al., Primer, 2021). Its derivative, written down, needs no mask of x > 0, which XLA would write out."""
    return jnp.square(jnp.maximum(x, 0))


@squared_relu.defjvp
def _squared_relu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (t,) = primals, tangents
    return squared_relu(x), 2 * jnp.maximum(x, 0) * t


def mlp(x: Array, c_fc: Array, c_proj: Array) -> Array:
    """relu(x c_fc)^2 c_proj. x [B, T, D], c_fc [D, F], c_proj [F, D].

    The hidden layer [B, T, F] goes without the name of what is kept: on a TPU to write it to memory and to read it costs more
    than its product.
    """
    return linear(squared_relu(_linear(x, c_fc.astype(x.dtype), 1)), c_proj)

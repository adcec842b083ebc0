"""The small parts of the transformer: norm, linear, rotary embedding, MLP. Pure functions of arrays.

Matrices are stored [in, out] in float32 and cast to the dtype of the activations; products accumulate in float32.
"""

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


def linear(x: Array, weight: Array) -> Array:
    """x [..., in] times weight [in, out], in the dtype of x with float32 accumulation, backward too."""
    return checkpoint_name(_linear(x, weight.astype(x.dtype)), PRODUCT)


@jax.custom_vjp
def _linear(x: Array, weight: Array) -> Array:
    return jnp.dot(x, weight, preferred_element_type=jnp.float32).astype(x.dtype)


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
    """x^T y in float32, [M, N] of x [..., M] and y [..., N]; on a CPU the narrower one is what gets transposed."""
    def rows(x: Array, y: Array) -> Array:
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if x.shape[1] <= y.shape[1]:
            return jnp.dot(transpose(x), y, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(jnp.dot(transpose(y), x, preferred_element_type=jnp.float32)).T

    def direct(x: Array, y: Array) -> Array:  # without a reshape, which would ask for a layout
        leading = tuple(range(x.ndim - 1))
        return jax.lax.dot_general(x, y, ((leading, leading), ((), ())), preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(x, y, cpu=rows, default=direct)


def _linear_bwd(residuals: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, weight = residuals
    d_x = jnp.dot(d_out, transpose(weight), preferred_element_type=jnp.float32)
    d_weight = product_transposed(x, d_out)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_linear.defvjp(lambda x, weight: (_linear(x, weight), (x, weight)), _linear_bwd)


def rotary_tables(positions: Array, head_dim: int, base: float, dtype: str) -> tuple[Array, Array]:
    """Cosines and sines [B, T, 1, h] for positions [B, T], the sines of the second half negative; rounded to `dtype`,
    returned as float32."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    cos, sin = (table.astype(dtype).astype(jnp.float32)[:, :, None, :] for table in (jnp.cos(angles), jnp.sin(angles)))
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, -sin], axis=-1)


def apply_rotary(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding (Su et al., 2021) of x [B, T, H, h], halves layout, turning by the negative angle as upstream."""
    swapped = jnp.roll(x, x.shape[-1] // 2, axis=-1)  # of whole heads: half ones fill half of a TPU's lanes
    return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)


def mlp(x: Array, c_fc: Array, c_proj: Array) -> Array:
    """relu(x c_fc)^2 c_proj (squared ReLU: So et al., Primer, 2021). x [B, T, D], c_fc [D, F], c_proj [F, D]."""
    return linear(jnp.square(jax.nn.relu(linear(x, c_fc))), c_proj)

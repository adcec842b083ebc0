"""The plain formulas of a layer: norm, linear, rotary embedding, MLP. Pure functions of arrays.

`gpt.py` uses the faster equivalents in `fast.py`; tests compare values and gradients of both.
Matrices are stored [in, out] in float32 and cast to the activations' dtype. Matmuls accumulate in
float32.
"""

import jax
import jax.numpy as jnp
from jax import Array

RMS_EPS = 1.1920929e-07  # float32 machine epsilon, torch's default for every input dtype


def rms_norm(x: Array) -> Array:
    """Root-mean-square norm over the last axis, without gain, in float32.

    Zhang and Sennrich, 2019.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + RMS_EPS)).astype(
        x.dtype
    )


def linear(x: Array, weight: Array, axes: int = 1) -> Array:
    """x [..., in] times weight [in, out], in x's dtype.

    `in` may be several axes (the last `axes` of x), and so may `out`.
    """
    out = jnp.tensordot(x, weight.astype(x.dtype), axes, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


def rotary_tables(positions: Array, head_dim: int, base: float, dtype: str) -> tuple[Array, Array]:
    """Cosines and sines [B, T, 1, h] for positions [B, T].

    The second half of the sines is negative. Rounded to `dtype`, returned as float32.
    """
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    cos, sin = (
        table.astype(dtype).astype(jnp.float32)[:, :, None, :]
        for table in (jnp.cos(angles), jnp.sin(angles))
    )
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, -sin], axis=-1)


def apply_rotary(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding (Su et al., 2021) of x [B, T, H, h], halves layout.

    Rotates by the negative angle, as upstream.
    """
    half = x.shape[-1] // 2
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., :half], sin[..., :half]
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x.dtype)


def rotary_norm(x: Array, cos: Array, sin: Array, scale: float) -> Array:
    """Queries or keys [B, T, H, h] for attention: rotated, normalized, times `scale`."""
    return rms_norm(apply_rotary(x, cos, sin)) * scale


def squared_relu(x: Array) -> Array:
    """relu(x)^2 (So et al., Primer, 2021)."""
    return jnp.square(jnp.maximum(x, 0))


def mlp(x: Array, mlp_fc: Array, mlp_proj: Array) -> Array:
    """relu(x mlp_fc)^2 mlp_proj. x [B, T, D], mlp_fc [D, F], mlp_proj [F, D]."""
    return linear(squared_relu(linear(x, mlp_fc)), mlp_proj)

"""Matmuls of training in float8 or int8, which some chips compute faster than bfloat16.

| precision | forward | data gradient | weight gradient | scales |
|---|---|---|---|---|
| bf16 | compute dtype | compute dtype | compute dtype | |
| fp8 | e4m3 x e4m3 | e5m2 x e4m3 | e4m3 x e5m2 | one per tensor |
| fp8_rowwise | e4m3 x e4m3 | e5m2 x e4m3 | e4m3 x e5m2 | one per row and per column |
| int8 | int8 x int8 | int8 x int8 | compute dtype | one per row and per column |

Scales are computed for every matmul, over the complete tensor: no mesh changes them. Libraries take
them per data shard inside a `shard_map`, and patch the modules of a model (qwix 0.1.8).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from nanochat_jax.errors import UsageError

PRECISIONS = ("bf16", "fp8", "fp8_rowwise", "int8")
E4M3, E5M2, INT8 = map(jnp.dtype, ("float8_e4m3fn", "float8_e5m2", "int8"))
LARGEST = {E4M3: 448.0, E5M2: 57344.0, INT8: 127.0}  # symmetric: int8's -128 is unused
TINY = 1e-30  # a tensor of zeros is scaled as if this were its largest entry


def has_units(precision: str, device: jax.Device) -> bool:
    """Whether a device multiplies in this precision faster than in bfloat16."""
    if precision == "bf16":
        return True
    kind = device.device_kind.lower()
    if precision == "int8":
        return "tpu v5" in kind or "tpu v6" in kind
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; ROCm: "gfx942"
    nvidia = capability[:1].isdigit() and float(capability) >= 8.9
    return nvidia or "tpu7" in kind


def check_units(precision: str, device: jax.Device) -> None:
    """Raise `UsageError` if an accelerator has no units for this precision. CPUs emulate all."""
    if device.platform != "cpu" and not has_units(precision, device):
        chips = "TPU v5e, v5p, v6e" if precision == "int8" else "H100 and later, Ada, TPU7x"
        raise UsageError(
            f"`precision={precision.partition('_')[0]}`: {device.device_kind} has no units for it "
            f"(they are in {chips}): use `precision=bf16`"
        )


def suits(weight: Array, axes: int) -> bool:
    """Whether both sizes of a weight [in, out], with `axes` axes of inputs, gain by it."""
    sizes = math.prod(weight.shape[:axes]), math.prod(weight.shape[axes:])
    return min(sizes) >= 128 and all(size % 16 == 0 for size in sizes)


class Scaled(NamedTuple):
    """A tensor of about `values * step`."""

    values: Array  # float8 or int8
    step: Array  # float32, of size 1 along the axes that share it


def scaled(x: Array, axes: tuple[int, ...] | None, dtype: jnp.dtype, *, rows: bool) -> Scaled:
    """x in `dtype`, with a step for all entries along `axes` (None: for all entries).

    `rows`: the entries that share a step are in several rows of the batch, so in several shards.
    """
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True).astype(jnp.float32)
    if rows and (names := tuple(jax.sharding.get_abstract_mesh().manual_axes)):
        largest = jax.lax.pmax(largest, names)
    limit = LARGEST[dtype]
    step = jnp.maximum(largest, TINY) / limit
    values = jnp.clip(x.astype(jnp.float32) / step, -limit, limit)
    return Scaled((jnp.round(values) if dtype == INT8 else values).astype(dtype), step)


def _dot(a: Scaled, b: Scaled, axes: tuple[tuple[int, ...], tuple[int, ...]], dtype: jnp.dtype):
    """a times b in `dtype`, contracted along `axes` of each."""
    kind = jnp.int32 if a.values.dtype == INT8 else dtype  # float8: a float32 result is traffic
    out = jax.lax.dot_general(a.values, b.values, (axes, ((), ())), preferred_element_type=kind)
    steps = jnp.squeeze(a.step, axes[0]), jnp.squeeze(b.step, axes[1])
    outer = steps[0].reshape(*steps[0].shape, *(1,) * steps[1].ndim) * steps[1]
    return (out.astype(jnp.float32) * outer).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def low_precision_matmul(x: Array, weight: Array, axes: int, precision: str) -> Array:
    """`layers.linear` with operands in float8 or int8; weight in x's dtype."""
    return _forward(x, weight, axes, precision)[0]


def _forward(x: Array, weight: Array, axes: int, precision: str) -> tuple[Array, tuple]:
    inner = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    whole, dtype = precision == "fp8", INT8 if precision == "int8" else E4M3
    left = scaled(x, None if whole else inner[0], dtype, rows=whole)
    right = scaled(weight, None if whole else inner[1], dtype, rows=False)
    # With other scales for each matmul, the backward pass needs the operands themselves.
    return _dot(left, right, inner, x.dtype), (left, right) if whole else (x, weight)


def _backward(axes: int, precision: str, saved: tuple, d_out: Array) -> tuple[Array, Array]:
    x, weight = saved
    ndim = (weight.values if precision == "fp8" else weight).ndim
    batch = tuple(range(d_out.ndim - ndim + axes))
    outer = tuple(range(len(batch), d_out.ndim)), tuple(range(axes, ndim))
    if precision == "fp8":
        whole = scaled(d_out, None, E5M2, rows=True)
        d_x = _dot(whole, weight, outer, d_out.dtype)
        return d_x, _dot(x, whole, (batch, batch), d_out.dtype)
    kind, d_kind = (INT8, INT8) if precision == "int8" else (E4M3, E5M2)
    left = scaled(d_out, outer[0], d_kind, rows=False)
    d_x = _dot(left, scaled(weight, outer[1], kind, rows=False), outer, d_out.dtype)
    if precision == "int8":
        d_weight = jnp.tensordot(x, d_out, (batch, batch), preferred_element_type=jnp.float32)
        return d_x, d_weight.astype(d_out.dtype)
    left, right = scaled(x, batch, kind, rows=True), scaled(d_out, batch, d_kind, rows=True)
    return d_x, _dot(left, right, (batch, batch), d_out.dtype)


low_precision_matmul.defvjp(_forward, _backward)

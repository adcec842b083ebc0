"""Weights as inference stores them."""

import dataclasses
import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

# In bfloat16, XLA's CPU matmul by a single vector is 10 times slower than by two or more. Fewer
# vectors than this are padded, and are the second operand, which is then 1.5 times as fast.
FEWEST_VECTORS = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """A weight [in, out], stored with a row of length `in` for each output.

    Why: the unembedding of a few tokens reads it in order on every device, and so do XLA's CPU
    matmuls in bfloat16. `fast.linear` takes it in place of an array. Not differentiated.

    Attributes:
      values: [out, in].
      shape: of the weight; `in` and `out` may each be several axes.
    """

    values: Array
    shape: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, weight: Array) -> "Rows":
        """The rows of a matrix [in, out]."""
        return cls(weight.T, weight.shape)

    def reshape(self, *shape: int) -> "Rows":
        rest = self.values.size // abs(math.prod(shape))
        return dataclasses.replace(
            self, shape=tuple(rest if size == -1 else size for size in shape)
        )

    def linear(self, x: Array, axes: int = 1) -> Array:
        """`layers.linear` of x with this weight."""
        kept = x.shape[: x.ndim - axes]
        vectors = x.reshape(math.prod(kept), -1)
        if x.dtype == jnp.bfloat16 and len(vectors) < FEWEST_VECTORS:
            out = self.columns(vectors).T
        else:
            out = _matmul(vectors, self.values)
        return out.astype(x.dtype).reshape(*kept, *self.shape[axes:])

    def columns(self, x: Array) -> Array:
        """The product [out, N] in float32 of vectors x [N, in]."""

        def product(x: Array) -> Array:
            return _matmul(self.values, x)

        def padded(x: Array) -> Array:
            more = jnp.zeros((FEWEST_VECTORS - len(x), x.shape[1]), x.dtype)
            return product(jnp.concatenate([x, more]))[:, : len(x)]

        if len(x) >= FEWEST_VECTORS or x.dtype != jnp.bfloat16:
            return product(x)
        return jax.lax.platform_dependent(x, cpu=padded, default=product)


def _matmul(x: Array, y: Array) -> Array:
    """x y^T in float32: [M, N] of x [M, in] and y [N, in]."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def as_table(table: Array) -> Array:
    """A bfloat16 table [V, ...] for `fast.lookup`, stored as the same bits in uint16.

    Why: XLA's CPU gather of bfloat16 first converts the complete table to float32.
    """
    return jax.lax.bitcast_convert_type(table, jnp.uint16)

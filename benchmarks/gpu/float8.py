"""float8 against bfloat16: the three matmuls of a linear layer at the shapes of d24's blocks.

Forward e4m3 x e4m3; gradients are e5m2. Operands of the float8 matmuls are quantized beforehand;
`quantize` says what that costs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks.gpu.plan import Size
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.timing import has_gpu, seconds_per_call

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2

# name -> (operands, contracted axis of each). x [R, in], w [in, out], dy [R, out].
MATMULS = {
    "forward": (("x", "w"), (1, 0)),
    "d_x": (("dy", "w"), (1, 1)),
    "d_w": (("x", "dy"), (0, 0)),
}


@partial(jax.jit, static_argnames="dtype")
def quantize(x: Array, dtype: Any) -> tuple[Array, Array]:
    """x scaled by its largest magnitude to the range of a float8 dtype, and the inverse scale."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    scale = jnp.finfo(dtype).max.astype(jnp.float32) / largest
    return (x.astype(jnp.float32) * scale).astype(dtype), 1.0 / scale


@partial(jax.jit, static_argnames="axes")
def matmul(a: Array, b: Array, scale: Array, axes: tuple[int, int]) -> Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    product = lax.dot_general(a, b, dimensions, preferred_element_type=jnp.bfloat16)
    return product * scale.astype(jnp.bfloat16)


def matmuls(record: Recorder, size: Size) -> None:
    if not has_gpu():
        record("float8 matmul", value="no GPU")
    width = size.float8_width
    shapes = {
        "attention": (width, width),
        "stacked qkv": (width, 3 * width),
        "mlp_fc": (width, 4 * width),
        "mlp_proj": (4 * width, width),
    }
    for layer, (fan_in, fan_out) in shapes.items():
        measure_layer(record, layer, size.float8_rows, fan_in, fan_out)


def measure_layer(record: Recorder, layer: str, rows: int, fan_in: int, fan_out: int) -> None:
    shapes = {"x": (rows, fan_in), "w": (fan_in, fan_out), "dy": (rows, fan_out)}
    full = {
        name: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, (name, shape) in enumerate(shapes.items())
    }
    small = {name: quantize(array, E5M2 if name == "dy" else E4M3) for name, array in full.items()}
    one = jnp.ones((), jnp.float32)
    for name, (operands, axes) in MATMULS.items():
        a, b = (full[operand] for operand in operands)
        (a8, a_scale), (b8, b_scale) = (small[operand] for operand in operands)
        scale = a_scale * b_scale
        bf16 = seconds_per_call(partial(matmul, a, b, one, axes), 20)
        f8 = seconds_per_call(partial(matmul, a8, b8, scale, axes), 20)
        expected, actual = matmul(a, b, one, axes), matmul(a8, b8, scale, axes)
        error = jnp.linalg.norm((actual - expected).astype(jnp.float32).ravel()) / jnp.linalg.norm(
            expected.astype(jnp.float32).ravel()
        )
        text = matmul.lower(a8, b8, scale, axes).compile().as_text() or ""
        flops = 2.0 * rows * fan_in * fan_out
        record(
            "matmul",
            layer=layer,
            matmul=name,
            rows=rows,
            fan_in=fan_in,
            fan_out=fan_out,
            bf16_ms=1e3 * bf16,
            f8_ms=1e3 * f8,
            speedup=bf16 / f8,
            bf16_tflops=flops / bf16 / 1e12,
            f8_tflops=flops / f8 / 1e12,
            relative_error=float(error),
            cublas_f8="matmul$f8" in text,
            triton="__triton" in text,
        )
    for name in ("x", "dy"):
        seconds = seconds_per_call(partial(quantize, full[name], E4M3), 20)
        record("quantize", layer=layer, operand=name, shape=shapes[name], ms=1e3 * seconds)

"""Fused causal attention of whole sequences on accelerators: Splash on TPU, cuDNN on GPU, both with sliding windows.

Each computes what `attention.causal_attention` does, the reference, without its [T, T] scores in memory. The mesh is part
of a kernel: rows are spread over its data axis, heads over its model axis.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from nanochat_jax.attention import causal_attention
from nanochat_jax.cli import UsageError
from nanochat_jax.config import GPTConfig
from nanochat_jax.layers import PRODUCT

CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's primitives of cuDNN attention
CUDNN_BACKWARD = "dot_product_attention_bwd_wrapper"
# A policy for `jax.checkpoint`. The outputs of cuDNN's forward call, whose statistics its backward needs, have no name in JAX.
KEEP_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(PRODUCT), lambda primitive, *_, **__: primitive.name == CUDNN_FORWARD)

ATTENTION = ("auto", "xla", "splash", "cudnn")
LANES = 128  # Splash's blocks are multiples of this

Attention = Callable[..., Array]  # (q [B, T, H, h], k, v [B, T, K, h], *, window) -> [B, T, H, h]


def forward_options(config: GPTConfig, mesh: Mesh | None, *, dtype: jnp.dtype, length: int, attention: str = "auto"
                    ) -> dict[str, Any]:
    """Arguments of `gpt.forward` that follow from the devices: a fused attention, and on TPUs a loop over layers.

    On GPUs the loop would cost copies of the stacked weights and activations, and programs compile fast without it.
    """
    if mesh is None:
        return {}
    attend = choose_attention(attention, mesh=mesh, dtype=dtype, length=length, head_dim=config.head_dim)
    return {"attention": attend, "scan": mesh.devices.flat[0].platform == "tpu"}


def choose_attention(kind: str, *, mesh: Mesh, dtype: jnp.dtype, length: int, head_dim: int) -> Attention:
    """The attention of rows of `length` tokens on the mesh's devices.

    "auto": on TPUs Splash, on NVIDIA GPUs cuDNN, for the shapes and dtypes that these can take; else the reference. A kernel
    asked for by name that cannot run raises `UsageError`.
    """
    device = mesh.devices.flat[0]
    cuda = device.platform in ("gpu", "cuda") and "rocm" not in device.client.platform_version.lower()
    old = cuda and float(getattr(device, "compute_capability", 8.0)) < 8.0
    refused = {
        "splash": (device.platform != "tpu" and "it runs on TPUs only"
                   or length % LANES and f"the row length {length} is not a multiple of {LANES}"),
        "cudnn": (not cuda and "it runs on NVIDIA GPUs only"
                  or old and "it needs compute capability 8.0 (Ampere)"
                  or jnp.dtype(dtype).itemsize != 2 and f"it computes in bfloat16, not {jnp.dtype(dtype)}"
                  or (head_dim % 8 or head_dim > 128) and f"heads of {head_dim} are not a multiple of 8 up to 128"),
    }
    if kind == "auto":
        kind = next((name for name, reason in refused.items() if not reason), "xla")
    if kind == "xla":
        return causal_attention
    if reason := refused[kind]:
        raise UsageError(f"--attention {kind}: {reason}; give --attention xla or auto")
    return functools.partial(splash_attention if kind == "splash" else cudnn_attention, mesh=mesh)


def _on_each_device(attend: Callable[..., Array], mesh: Mesh, q: Array, k: Array, v: Array) -> Array:
    """`attend(q, k, v)` of each device's rows and heads, as far as the code around does not run on each device already.

    Rows and heads that do not divide over an axis are computed by all its devices.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = {axis for axis in mesh.axis_names if axis not in manual}
    if not axes:
        return attend(q, k, v)
    rows, heads = (axis if axis in axes and k.shape[dimension] % mesh.shape[axis] == 0 else None
                   for dimension, axis in ((0, "data"), (2, "model")))
    spec = PartitionSpec(rows, None, heads, None)
    return jax.shard_map(attend, mesh=None if manual else mesh, in_specs=(spec,) * 3, out_specs=spec, axis_names=axes,
                         check_vma=False)(q, k, v)


def _block(length: int, most: int) -> int:
    """The largest block of whole lanes, up to `most`, that divides the length."""
    return next(size for size in range(most, 0, -LANES) if length % size == 0)


def _splash_kernel(length: int, heads: int, window: int | None, interpret: bool) -> Callable:
    """A kernel of one row: q [H, T, h], k and v [K, T, h] -> [H, T, h]."""
    # Here, because Pallas takes long to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    whole = window is None or window >= length - 1
    mask: masks.Mask = masks.CausalMask((length, length)) if whole else masks.LocalMask((length, length), (window, 0), 0)
    # A block of keys wider than the window would be mostly masked.
    most = 1024 if window is None or window >= 1024 else max(LANES, window // LANES * LANES)
    q_block, kv_block = _block(length, 512), _block(length, most)
    compute = _block(kv_block, 512)
    sizes = splash.BlockSizes(block_q=q_block, block_kv=kv_block, block_kv_compute=compute, block_q_dkv=q_block,
                              block_kv_dkv=kv_block, block_kv_dkv_compute=compute, use_fused_bwd_kernel=True)
    # Not to be kept for another call: the mask's tables belong to the trace that they are made in.
    return splash.make_splash_mha(masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                  residual_checkpoint_name=PRODUCT, interpret=interpret)


def splash_attention(q: Array, k: Array, v: Array, *, window: int | None, mesh: Mesh, interpret: bool = False) -> Array:
    """As `attention.causal_attention`, by the Pallas kernel for TPUs. T is a multiple of 128.

    `interpret` runs the kernel step by step on any device, for tests.
    """

    def local(q: Array, k: Array, v: Array) -> Array:
        kernel = _splash_kernel(q.shape[1], q.shape[2], window, interpret)
        rows = (jnp.swapaxes(each, 1, 2) for each in (q, k, v))
        return jnp.swapaxes(jax.vmap(kernel)(*rows), 1, 2)

    q = q * jnp.asarray(1.0 / math.sqrt(q.shape[-1]), q.dtype)  # the kernel does not scale
    return _on_each_device(local, mesh, q, k, v)


def cudnn_attention(q: Array, k: Array, v: Array, *, window: int | None, mesh: Mesh) -> Array:
    """As `attention.causal_attention`, by cuDNN. Without `is_causal` a window's queries would see the future too."""
    local = None if window is None or window >= q.shape[1] - 1 else (window, 0)
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, local_window_size=local, implementation="cudnn")
    return _on_each_device(attend, mesh, q, k, v)

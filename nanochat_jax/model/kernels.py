"""Fused causal attention of complete sequences: Splash on TPU, cuDNN on GPU, both with windows.

Both compute `attention.causal_attention` without its [T, T] scores in memory. Rows are sharded over
the mesh's data axis, heads over its model axis.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from nanochat_jax.errors import one_line
from nanochat_jax.model.fast import SAVED

CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's primitives of cuDNN attention
CUDNN_BACKWARD = "dot_product_attention_bwd_wrapper"
LANES = 128  # Splash's blocks are multiples of this

# What `remat` "minimal" saves. The outputs of cuDNN's forward call cannot be named, so the
# primitive is; its backward call needs the statistics among them.
SAVE_MATMULS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(SAVED),
    lambda primitive, *_, **__: primitive.name == CUDNN_FORWARD,
)


def splash_refuses(q: Array | jax.ShapeDtypeStruct, device: jax.Device) -> str | None:
    """Why Splash cannot compute q [B, T, H, h]; None if it can."""
    if device.platform != "tpu":
        return "it runs on TPUs only"
    if q.shape[1] % LANES:
        return f"the row length {q.shape[1]} is not a multiple of {LANES}"
    return None


def cuda_capability(device: jax.Device) -> float | None:
    """The compute capability of an NVIDIA GPU, such as 9.0; None for other devices."""
    if device.platform not in ("gpu", "cuda") or "rocm" in device.client.platform_version.lower():
        return None
    return float(getattr(device, "compute_capability", 8.0))


def cudnn_refuses(q: Array | jax.ShapeDtypeStruct, device: jax.Device) -> str | None:
    """Why cuDNN cannot compute q [B, T, H, h]; None if it can."""
    capability = cuda_capability(device)
    if capability is None:
        return "it runs on NVIDIA GPUs only"
    if capability < 8.0:
        return "it needs compute capability 8.0 (Ampere)"
    if q.dtype.itemsize != 2:
        return f"it computes in bfloat16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"heads of {q.shape[-1]} are not a multiple of 8 up to 128"
    return None


def _on_each_device(attend: Callable[..., Array], mesh: Mesh | None, *qkv: Array) -> Array:
    """`attend(q, k, v)` per device, over the mesh axes that are not manual already."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = {axis for axis in mesh.axis_names if axis not in manual} if mesh is not None else set()
    if mesh is None or not axes:
        return attend(*qkv)
    k = qkv[1]
    rows, heads = (
        axis if axis in axes and k.shape[dimension] % mesh.shape[axis] == 0 else None
        for dimension, axis in ((0, "data"), (2, "model"))
    )
    spec = PartitionSpec(rows, None, heads, None)
    on_shards = jax.shard_map(
        attend,
        mesh=None if manual else mesh,
        in_specs=(spec,) * 3,
        out_specs=spec,
        axis_names=axes,
        check_vma=False,
    )
    return on_shards(*qkv)


def _block(length: int, most: int) -> int:
    """The largest multiple of `LANES`, up to `most`, that divides the length."""
    return next(size for size in range(most, 0, -LANES) if length % size == 0)


def _splash_kernel(length: int, heads: int, window: int | None, interpret: bool) -> Callable:
    """A kernel for one row: q [H, T, h], k and v [K, T, h] -> [H, T, h]."""
    # Pallas takes long to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask: masks.Mask
    if window is None or window >= length - 1:
        mask = masks.CausalMask((length, length))
    else:
        mask = masks.LocalMask((length, length), (window, 0), 0)
    # A block of keys wider than the window would be mostly masked.
    widest = 1024 if window is None or window >= 1024 else max(LANES, window // LANES * LANES)
    q_block, kv_block = _block(length, 512), _block(length, widest)
    compute = _block(kv_block, 512)
    sizes = splash.BlockSizes(
        block_q=q_block,
        block_kv=kv_block,
        block_kv_compute=compute,
        block_q_dkv=q_block,
        block_kv_dkv=kv_block,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    # Not cached: the mask's tables belong to the current trace.
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )


def splash_attention(
    q: Array, k: Array, v: Array, *, window: int | None, mesh: Mesh | None, interpret: bool = False
) -> Array:
    """`attention.causal_attention` by Pallas's Splash kernel for TPUs. T is a multiple of 128."""

    def local(q: Array, k: Array, v: Array) -> Array:
        kernel = _splash_kernel(q.shape[1], q.shape[2], window, interpret)
        by_head = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        return jnp.swapaxes(jax.vmap(kernel)(*by_head), 1, 2)

    q = q * jnp.asarray(1.0 / math.sqrt(q.shape[-1]), q.dtype)  # the kernel does not scale
    return _on_each_device(local, mesh, q, k, v)


def cudnn_attention(
    q: Array, k: Array, v: Array, *, window: int | None, mesh: Mesh | None
) -> Array:
    """`attention.causal_attention` by cuDNN.

    A window also needs `is_causal`: without it, queries would see the future.
    """
    local = None if window is None or window >= q.shape[1] - 1 else (window, 0)
    attend = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        local_window_size=local,
        implementation="cudnn",
    )
    return _on_each_device(attend, mesh, q, k, v)


@functools.cache
def cudnn_failure() -> str | None:
    """Why cuDNN attention fails on this machine; None if a small call succeeds.

    Some versions of cuDNN and of the driver refuse every call, which no property of them tells.
    """
    try:
        q = jnp.ones((1, LANES, 1, 64), jnp.bfloat16, device=jax.local_devices()[0])
        attend = functools.partial(cudnn_attention, window=LANES // 2, mesh=None)
        total = jax.jit(jax.grad(lambda q: attend(q, q, q).astype(jnp.float32).sum()))
        jax.block_until_ready(total(q))
    except Exception as error:  # of JAX, of XLA, or of cuDNN
        return one_line(error)
    return None

"""`Compute`: how a model runs on devices, as opposed to what it computes (`GPTConfig`).

Made once per run by `Compute.on`, the only place that decides what depends on the devices. Frozen
and hashable, so jitted functions take it as a static argument.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from nanochat_jax.errors import UsageError
from nanochat_jax.model import kernels
from nanochat_jax.model.precision import PRECISIONS, check_units
from nanochat_jax.model.sharding import gather_json

log = logging.getLogger(__name__)

REMAT = ("none", "minimal", "block", "full")
ATTENTION = ("auto", "xla", "splash", "cudnn")
DTYPES = ("float32", "bfloat16")
DTYPE_VARIABLE = "NANOCHAT_DTYPE"


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How to compute. The default, float32 and the reference attention, is the tests' reference.

    Attributes:
      mesh: axes ("data", "model"): rows are sharded over data, heads over model; None: one device.
      dtype: of activations and matmul operands.
      cache_dtype: of the KV cache; None: `dtype`.
      remat: what the backward pass recomputes:

        | mode | saved for the backward pass |
        |---|---|
        | none | everything |
        | minimal | results of matmuls and attention, but not the MLP's hidden layer |
        | block | the input of each layer |
        | full | the inputs of about sqrt(L) layers (Chen et al., 2016); recomputes others twice |

      attention: a name in `ATTENTION`, or a function (q, k, v, *, window). "auto" is the devices'
        fused kernel if it supports shape and dtype, else the reference.
      scan: run equal groups of layers as a loop, so that deep models compile fast (not with a
        cache).
      gather: `gather(name, weight)` returns the complete weight where each device holds a part
        (`sharding.gather_over_data`); None: weights are complete, or XLA gathers them.
      precision: of the layers' matmuls in training, a name in `PRECISIONS` (precision.py).
    """

    mesh: Mesh | None = None
    dtype: Any = jnp.dtype(jnp.float32)
    cache_dtype: Any = None
    remat: str = "none"
    attention: str | Callable[..., Array] = "xla"
    scan: bool = False
    gather: Callable[[str, Array], Array] | None = None
    precision: str = "bf16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "cache_dtype", jnp.dtype(self.cache_dtype or self.dtype))
        for name, value, allowed in (
            ("remat", self.remat, REMAT),
            ("attention", self.attention, ATTENTION),
            ("precision", self.precision, PRECISIONS),
        ):
            if isinstance(value, str) and value not in allowed:
                raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}")

    @classmethod
    def on(
        cls,
        mesh: Mesh | None,
        *,
        dtype: Any = "auto",
        cache_dtype: Any = "auto",
        remat: str = "none",
        attention: str = "auto",
        precision: str = "bf16",
    ) -> "Compute":
        """The `Compute` for a mesh, or for the first device.

        A `cache_dtype` of "auto" is float32 on a CPU, where attention in bfloat16 is slower, and
        `dtype` on accelerators.

        Tries cuDNN attention where it would be used. If it fails, "auto" becomes the reference,
        with a warning; "cudnn" raises `UsageError`. So does a precision for which the device has no
        units.

        Layers run as a loop on TPUs only. On GPUs a loop would copy the stacked weights and
        activations, and programs compile fast without it.
        """
        device = device_of(mesh)
        check_units(precision, device)
        dtype = resolve_dtype(dtype, device)
        if cache_dtype == "auto":
            cache_dtype = jnp.float32 if device.platform == "cpu" else dtype
        return cls(
            mesh=mesh,
            dtype=dtype,
            cache_dtype=cache_dtype,
            remat=remat,
            attention=_working_attention(attention, device, dtype),
            scan=device.platform == "tpu",
            precision=precision,
        )

    def replace(self, **changes: Any) -> "Compute":
        return dataclasses.replace(self, **changes)

    def gathered(self, name: str, weight: Array) -> Array:
        """The complete weight. Called right before it is used."""
        return weight if self.gather is None else self.gather(name, weight)

    @property
    def num_shards(self) -> int:
        """Number of devices that traced arrays are sharded over; fewer inside a `shard_map`."""
        if self.mesh is None:
            return 1
        manual = jax.sharding.get_abstract_mesh().manual_axes
        return math.prod(size for axis, size in self.mesh.shape.items() if axis not in manual)


REFERENCE = Compute()


def device_of(mesh: Mesh | None) -> jax.Device:
    """The mesh's first device, or the first device without a mesh."""
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def resolve_dtype(name: Any, device: jax.Device | None = None) -> Any:
    """The compute dtype.

    "auto" is `NANOCHAT_DTYPE`, or else float32 on CPUs and on GPUs without bfloat16 (before
    Ampere), and bfloat16 on other devices.
    """
    if name == "auto":
        name = os.environ.get(DTYPE_VARIABLE) or _default_dtype(device or jax.devices()[0])
        if name not in DTYPES:
            raise UsageError(f"{DTYPE_VARIABLE}={name}: expected {' or '.join(DTYPES)}")
    return jnp.dtype(name)


def _default_dtype(device: jax.Device) -> str:
    capability = kernels.cuda_capability(device)
    slow = device.platform == "cpu" or (capability is not None and capability < 8.0)
    return "float32" if slow else "bfloat16"


def _working_attention(attention: str, device: jax.Device, dtype: Any) -> str:
    queries = jax.ShapeDtypeStruct((1, kernels.LANES, 1, kernels.LANES), dtype)
    # Devices that are only compiled for (`tpu.plan`) are not among those of this machine.
    if (
        attention not in ("auto", "cudnn")
        or device not in jax.devices()
        or kernels.cudnn_refuses(queries, device)
    ):
        return attention
    failures = [text for text in gather_json(kernels.cudnn_failure()) if text]
    if not failures:
        return attention
    if attention == "cudnn":
        raise UsageError(f"`attention=cudnn`: cuDNN fails ({failures[0]}); choose xla or auto")
    log.warning(
        f"cuDNN attention fails ({failures[0]}): using XLA's, which is slower and needs more memory"
    )
    return "xla"

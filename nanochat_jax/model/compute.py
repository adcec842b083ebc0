"""`Compute`: how a model runs on devices, as opposed to what it computes (`GPTConfig`).

Made once per run by `Compute.on`, the only place that decides what depends on the devices. Frozen
and hashable, so jitted functions take it as a static argument.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from nanochat_jax.model.precision import PRECISIONS, check_units

REMAT = ("none", "minimal", "block", "full")
ATTENTION = ("auto", "xla", "splash", "cudnn")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How to compute. The default, float32 and the reference attention, is the tests' reference.

    Attributes:
      mesh: axes ("data", "model"): rows are sharded over data, heads over model; None: one device.
      dtype: of activations and matmul operands.
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
    remat: str = "none"
    attention: str | Callable[..., Array] = "xla"
    scan: bool = False
    gather: Callable[[str, Array], Array] | None = None
    precision: str = "bf16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
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
        remat: str = "none",
        attention: str = "auto",
        precision: str = "bf16",
    ) -> "Compute":
        """The `Compute` for a mesh, or for the first device.

        Raises `UsageError` if the device has no units for the precision.

        Layers run as a loop on TPUs only. On GPUs a loop would copy the stacked weights and
        activations, and programs compile fast without it.
        """
        device = device_of(mesh)
        check_units(precision, device)
        platform = device.platform
        return cls(
            mesh=mesh,
            dtype=resolve_dtype(dtype, platform),
            remat=remat,
            attention=attention,
            scan=platform == "tpu",
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


def resolve_dtype(name: Any, platform: str | None = None) -> Any:
    """The compute dtype: "auto" is float32 on a CPU and bfloat16 on accelerators."""
    if name == "auto":
        name = "float32" if (platform or jax.devices()[0].platform) == "cpu" else "bfloat16"
    return jnp.dtype(name)

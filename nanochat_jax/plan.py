"""Compile a model's real steps for accelerators that are not there, and tell what they need and
how fast they can be.

TPU slices: any of `CHIPS` with a topology such as v6e:2x4, compiled by libtpu. NVIDIA GPUs:
h100:8, h200:8 or b200:8, compiled by XLA's CUDA plugin without a GPU or cuDNN, whose attention is
a call into the library at run time.
"""

import contextlib
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanochat_jax.cli import UsageError, one_line
from nanochat_jax.metrics import PEAK_FLOPS
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.loss import Batch
from nanochat_jax.model.sharding import abstract_tree
from nanochat_jax.model.size import flops_per_token
from nanochat_jax.plan_cost import HloCost, hlo_cost, jaxpr_flops
from nanochat_jax.train.memory import is_out_of_memory
from nanochat_jax.train.step import BatchShape, TrainState

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published figures of one device."""

    hbm: int  # bytes that a program may use
    bandwidth: float  # bytes/s of that memory
    # bytes/s that a device can send to the others of its slice or node, all links together
    link: float
    shapes: tuple[str, ...] = ()  # TPU slices that cloud providers offer

    def peak(self, name: str) -> float:
        return PEAK_FLOPS[name]


CHIPS = {
    "v5e": Chip(
        int(15.75 * GIB), 819e9, 100e9, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
    ),
    "v5p": Chip(int(95.74 * GIB), 2.765e12, 300e9),
    "v6e": Chip(
        int(31.25 * GIB),
        1.638e12,
        224e9,
        ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
    # SXM modules. Memory is 92% of what CUDA reports as total. Links: NVLink 4 and 5, one
    # direction, from NVIDIA's data sheets.
    "h100": Chip(int(79.1 * GIB * 0.92), 3.352e12, 450e9),
    "h200": Chip(int(139.8 * GIB * 0.92), 4.8e12, 450e9),
    "b200": Chip(int(178.3 * GIB * 0.92), 7.672e12, 900e9),
}


@dataclass(frozen=True)
class Gpu:
    """What XLA must know of a GPU that is absent and that differs between ours
    (xla/backends/gpu/target_config/specs).
    """

    name: str
    cores: int  # streaming multiprocessors
    clock_ghz: float
    l2_bytes: int
    memory_bytes: int
    capability: int  # major compute capability; the minor one is 0

    def target_config(self, bandwidth: float) -> str:
        """The text of a `GpuTargetConfigProto`."""
        return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: {self.l2_bytes} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {self.capability} minor: 0 }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{self.name}"
"""


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 132, 1.98, 52428800, 84942979072, 9),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", 132, 1.98, 52428800, 151397597184, 9),
    "b200": Gpu("NVIDIA B200", 148, 1.965, 132644864, 191514411008, 10),
}
CUDA_PLUGINS = ("xla_cuda13", "xla_cuda12")
INSTALL_TPU = "the compiler for TPUs is missing: pip install 'jax[tpu]'"
INSTALL_GPU = (
    "the compiler for GPUs is missing: pip install --no-deps jax-cuda12-pjrt=={0} "
    "jax-cuda12-plugin=={0} "
    "nvidia-cuda-nvcc-cu12"
)


def topology_devices(name: str) -> tuple[str, list[jax.Device]]:
    """(chip, compile-only devices) of "v6e:2x4", "v6e-8", "v5p:2x2x2" or "h100:8". Raises
    `UsageError`.
    """
    chip, _, shape = name.replace("-", ":").partition(":")
    if chip not in CHIPS or not shape:
        raise UsageError(
            f"--topology {name!r} is not CHIP:SHAPE with a chip of {', '.join(CHIPS)}, such as "
            "v6e:2x4, v5e-16, "
            "v5p:2x2x2 or h100:8"
        )
    if shape.isdigit() and CHIPS[chip].shapes:
        by_count = {math.prod(map(int, each.split("x"))): each for each in CHIPS[chip].shapes}
        if int(shape) not in by_count:
            raise UsageError(
                f"--topology {name}: {chip} comes in {', '.join(map(str, by_count))} chips"
            )
        shape = by_count[int(shape)]
    tpu = chip.startswith("v")
    if not (
        _has("libtpu")
        if tpu
        else _has("jax_plugins") and any(_has(f"jax_plugins.{name}") for name in CUDA_PLUGINS)
    ):
        raise UsageError(
            f"--topology {name}: {INSTALL_TPU if tpu else INSTALL_GPU.format(jax.__version__)}"
        )
    # No chip is touched: nothing to ask of the cloud, and no reason to keep other processes from
    # libtpu.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        if tpu:
            bounds = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
            devices = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{chip}:{shape}", **bounds
            ).devices
        else:
            target = GPUS[chip].target_config(CHIPS[chip].bandwidth)
            devices = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                target_config=target,
                topology=f"1x1x{int(shape)}",
            ).devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise UsageError(f"--topology {name}: {one_line(error)}") from error
    return chip, devices


@contextlib.contextmanager
def assumed_cudnn() -> Iterator[None]:
    """While it lasts, JAX takes cuDNN 9.8, that of `GPUS`, for installed.

    JAX asks for the version while it traces cuDNN attention. Only a run needs the library: lowered
    and compiled, the call is the name of a function.
    """
    from jax._src.cudnn import fused_attention_stablehlo as attention

    check = attention.check_cudnn_version
    attention.check_cudnn_version = lambda: 90800
    try:
        yield
    finally:
        attention.check_cudnn_version = check


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    optimizer: int  # state of the optimizer, or the cache of the engine
    temporary: int  # activations, gradients, copies in the compute dtype
    total: int  # of all, arguments and results together, what is donated once
    limit: int

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclass(frozen=True)
class Plan:
    """One compiled program on one kind of device; per device and step unless it says otherwise."""

    chip: str
    devices: int
    memory: Memory
    flops: float  # of the products as executed, recomputation included
    model_flops: float  # that the step is worth, what MFU counts
    cost: HloCost
    tokens: int  # of a step, over all devices
    compile_seconds: float

    @property
    def times(self) -> dict[str, float]:
        """Seconds that products, memory and links need at their peak rates, each alone."""
        chip = CHIPS[self.chip]
        return {
            "products": self.flops / chip.peak(self.chip),
            "memory": self.cost.hbm_bytes / chip.bandwidth,
            "links": sum(self.cost.sent.values()) / chip.link,
        }

    @property
    def step_seconds(self) -> float:
        """The roofline: the slowest of the three, the others hidden behind it."""
        return max(self.times.values())

    @property
    def serial_seconds(self) -> float:
        """The same where kernels run one at a time, each as long as the slowest of its own three:
        first those with products, then the element-wise ones and copies, then collectives.
        """
        products, collectives = (
            sum(self.cost.traffic.get(kind, 0.0) for kind in kinds) / CHIPS[self.chip].bandwidth
            for kinds in (("products", "kernels"), ("collectives",))
        )
        times = self.times
        return (
            max(times["products"], products)
            + times["memory"]
            - products
            - collectives
            + max(times["links"], collectives)
        )

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilization of steps that take so long. It may exceed 1: a model's FLOPs
        count all keys of its window for each query, as is the custom, but the first queries of a
        row see fewer and fused attention computes only those.
        """
        return self.model_flops / (CHIPS[self.chip].peak(self.chip) * seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    def as_json(self) -> dict[str, Any]:
        return {
            "chip": self.chip,
            "devices": self.devices,
            "memory": asdict(self.memory) | {"fits": self.memory.fits},
            "flops": self.flops,
            "model_flops": self.model_flops,
            "hbm_bytes": self.cost.hbm_bytes,
            "traffic": dict(self.cost.traffic),
            "collectives": {
                kind: {"calls": self.cost.calls[kind], "bytes_sent": self.cost.sent[kind]}
                for kind in self.cost.sent
            },
            "kernels": dict(self.cost.kernels),
            "largest_array": self.cost.largest[1],
            "loops_counted_once": self.cost.unknown_loops,
            "seconds": self.times,
            "step_seconds": self.step_seconds,
            "mfu_bound": self.mfu(self.step_seconds),
            "one_at_a_time": {
                "step_seconds": self.serial_seconds,
                "mfu": self.mfu(self.serial_seconds),
                "tokens_per_second": self.tokens / self.serial_seconds,
            },
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_step": self.tokens,
            "compile_seconds": self.compile_seconds,
        }


def tree_bytes(tree: Any) -> int:
    """Bytes of an abstract, placed tree on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


class DoesNotFit(Exception):
    """The compiler refused: the program needs more memory than the device has."""


def compile_plan(
    step: jax.stages.Wrapped,
    arguments: Sequence[Any],
    *,
    chip: str,
    mesh: Mesh,
    parameters: Any,
    state: Any,
    flops: float,
    model_flops: float,
    tokens: int,
    options: dict[str, str | bool] | None = None,
) -> Plan:
    """Compile a jitted function for abstract, placed arguments. `flops` and `model_flops` are over
    all devices.

    Raises `DoesNotFit` where the compiler itself says so (TPUs).
    """
    began = time.perf_counter()
    try:
        compiled = step.lower(*arguments).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            raise DoesNotFit(str(error).splitlines()[0]) from error
        if "No PTX compilation provider" in str(error):
            raise UsageError(
                "ptxas, the assembler for GPUs, is missing: "
                "pip install --no-deps nvidia-cuda-nvcc-cu12"
            ) from error
        raise
    stats, text = compiled.memory_analysis(), compiled.as_text()
    assert stats is not None and text is not None
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    memory = Memory(
        tree_bytes(parameters), tree_bytes(state), stats.temp_size_in_bytes, total, CHIPS[chip].hbm
    )
    return Plan(
        chip,
        mesh.size,
        memory,
        flops / mesh.size,
        model_flops / mesh.size,
        hlo_cost(text),
        tokens,
        time.perf_counter() - began,
    )


def train_plan(
    config: GPTConfig,
    step: jax.stages.Wrapped,
    state: TrainState,
    shardings: TrainState,
    shape: BatchShape,
    *,
    chip: str,
    mesh: Mesh,
    options: dict[str, str | bool] | None = None,
) -> Plan:
    """The plan of a train step as `step.make_train_step` makes it, for the shapes of its state."""
    state = abstract_tree(state, shardings)
    rows = jax.ShapeDtypeStruct(
        (shape.accumulation, shape.micro_rows, shape.sequence_len),
        jnp.int32,
        sharding=NamedSharding(mesh, PartitionSpec(None, "data")),
    )
    batch = Batch(rows, rows)
    with assumed_cudnn():
        flops = jaxpr_flops(
            step.trace(state, batch).jaxpr,
            config,
            platform="tpu" if chip.startswith("v") else "cuda",
        )
        return compile_plan(
            step,
            (state, batch),
            chip=chip,
            mesh=mesh,
            parameters=state.params,
            state=state.optimizer,
            flops=flops,
            model_flops=float(flops_per_token(config)) * shape.tokens,
            tokens=shape.tokens,
            options=options,
        )


def largest_batch(attempt: Callable[[int], Plan], rows: int) -> tuple[int, Plan]:
    """The largest power of two of rows per device, up to `rows`, whose plan fits, and that plan;
    one compile each.
    """
    best = None
    size = 1
    while size <= rows:
        try:
            plan = attempt(size)
        except DoesNotFit:
            break
        if not plan.memory.fits:
            break
        best, size = (size, plan), size * 2
    if best is None:
        raise UsageError(
            "not even one row per device fits: give --remat block or full, --fsdp, a larger slice "
            "or a smaller "
            "--depth or --max-seq-len"
        )
    return best

"""Compiles the real steps of a model for devices that this machine does not have.

Reports the memory that a step needs and the time that it takes at least. TPU slices, such as
v6e:2x4, are compiled by libtpu. NVIDIA GPUs, such as h100:8, are compiled by XLA's CUDA plugin.
Neither a GPU nor cuDNN is needed: cuDNN is only called at run time.
"""

import contextlib
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from nanochat_jax.errors import UsageError, one_line
from nanochat_jax.metrics import PEAKS
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.sharding import abstract_tree
from nanochat_jax.model.size import flops_per_token
from nanochat_jax.train.memory import is_out_of_memory, program_bytes
from nanochat_jax.train.step import BatchShape, TrainState, abstract_batch
from tpu.cost import HloCost, hlo_cost, jaxpr_flops
from tpu.cycles import Kernel, estimated_kernels

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published figures of one device."""

    hbm: int  # bytes of HBM that a program may use
    bandwidth: float  # bytes/s of HBM
    link: float  # bytes/s sent to the other devices of the slice or node, over all links
    network: float = 0.0  # bytes/s to other TPU slices: the host's network cards, per chip
    shapes: tuple[str, ...] = ()  # shapes of the slices that cloud providers offer


# float8 and int8 FLOP/s as a multiple of bfloat16's, on every chip that has units for them.
# Sources: the data sheets of H100, H200 and B200, Google's pages on v5e, v5p and v6e.
LOW_PRECISION_SPEEDUP = 2.0

SHAPES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    "v5e": Chip(int(15.75 * GIB), 819e9, 100e9, 3.125e9, SHAPES),
    "v5p": Chip(int(95.74 * GIB), 2.765e12, 300e9, 6.25e9),
    "v6e": Chip(int(31.25 * GIB), 1.638e12, 224e9, 12.5e9, SHAPES),
    # SXM modules. Memory is 92% of the total that CUDA reports. Links are NVLink 4 and 5 in one
    # direction. Sources: NVIDIA's data sheets.
    "h100": Chip(int(79.1 * GIB * 0.92), 3.352e12, 450e9),
    "h200": Chip(int(139.8 * GIB * 0.92), 4.8e12, 450e9),
    "b200": Chip(int(178.3 * GIB * 0.92), 7.672e12, 900e9),
}


@dataclass(frozen=True)
class Gpu:
    """Properties that XLA needs to compile for a GPU that is missing.

    Source: xla/backends/gpu/target_config/specs. Properties that all of `GPUS` share are in
    `target_config`.
    """

    name: str
    cores: int  # streaming multiprocessors
    clock_ghz: float
    l2_bytes: int
    memory_bytes: int
    capability: int  # major compute capability; the minor version is 0

    def target_config(self, bandwidth: float) -> str:
        """Return a `GpuTargetConfigProto` in text format. `bandwidth` is in bytes/s."""
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


# Compiling touches no chip. Without these variables, libtpu queries the cloud's metadata server
# and locks out other processes.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def topology_devices(name: str, slices: int = 1) -> tuple[str, list[jax.Device]]:
    """Return the chip and the compile-only devices of "v6e:2x4", "v6e-8", "v5p:2x2x2" or "h100:8".

    With `slices`, they are the devices of several such TPU slices.

    Raises `UsageError` if the topology is unknown or its compiler is not installed.
    """
    chip, shape = _parse_topology(name)
    tpu = _is_tpu(chip)
    if slices > 1 and not tpu:
        raise UsageError(f"`slices={slices}`: only TPUs have slices; use `topology={chip}:N`")
    if tpu and not _has("libtpu"):
        raise UsageError(f"`topology={name}`: {INSTALL_TPU}")
    if not tpu and not (
        _has("jax_plugins") and any(_has(f"jax_plugins.{plugin}") for plugin in CUDA_PLUGINS)
    ):
        raise UsageError(f"`topology={name}`: {INSTALL_GPU.format(jax.__version__)}")
    for variable, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        return chip, _tpu_devices(chip, shape, slices) if tpu else _gpu_devices(chip, shape)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise UsageError(f"`topology={name}`: {one_line(error)}") from error


def _parse_topology(name: str) -> tuple[str, str]:
    """Split a topology into chip and shape. A number of TPU chips becomes a shape."""
    chip, _, shape = name.replace("-", ":").partition(":")
    if chip not in CHIPS or not shape:
        raise UsageError(
            f"`topology` {name!r} is not CHIP:SHAPE; CHIP is one of {', '.join(CHIPS)}, "
            "for example v6e:2x4, v5e-16, v5p:2x2x2 or h100:8"
        )
    shapes = CHIPS[chip].shapes
    if not shape.isdigit() or not shapes:
        return chip, shape
    by_count = {math.prod(map(int, shape.split("x"))): shape for shape in shapes}
    if int(shape) not in by_count:
        raise UsageError(
            f"`topology={name}`: {chip} slices have {', '.join(map(str, by_count))} chips"
        )
    return chip, by_count[int(shape)]


def _tpu_devices(chip: str, shape: str, slices: int) -> list[jax.Device]:
    from jax.experimental import topologies

    bounds = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:{shape}", num_slices=slices, **bounds
    ).devices


def _gpu_devices(chip: str, count: str) -> list[jax.Device]:
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=GPUS[chip].target_config(CHIPS[chip].bandwidth),
        topology=f"1x1x{int(count)}",
    ).devices


def _is_tpu(chip: str) -> bool:
    return chip not in GPUS


@contextlib.contextmanager
def assumed_cudnn() -> Iterator[None]:
    """Make JAX assume cuDNN 9.8, the version in `Gpu.target_config`, within the context.

    JAX checks the version when it traces cuDNN attention. Compiling does not need the library: the
    compiled program only has the name of the call.
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
    optimizer: int  # optimizer state, or the engine's cache
    temporary: int  # activations, gradients, copies in the compute dtype
    total: int  # arguments, results, temporaries and code; donated arguments count once
    limit: int  # available on the device

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclass(frozen=True)
class Plan:
    """Cost of one compiled program. Figures are per device and step unless noted otherwise."""

    chip: str
    devices: int
    memory: Memory
    flops: float  # of the executed matmuls, recomputation included
    low_flops: float  # the part of `flops` with float8 or int8 operands
    model_flops: float  # that MFU counts
    cost: HloCost
    tokens: int  # per step, over all devices
    compile_seconds: float
    kernels: Sequence[Kernel] = ()  # with the compiler's estimates (TPUs only), the longest first

    @property
    def times(self) -> dict[str, float]:
        """Seconds of the matmuls (products), of HBM, of the links and, with several slices, of the
        network between them, each at its peak rate.
        """
        chip = CHIPS[self.chip]
        low = self.low_flops * (1 - 1 / LOW_PRECISION_SPEEDUP)
        times = {
            "products": (self.flops - low) / PEAKS[self.chip][0],
            "memory": self.cost.hbm_bytes / chip.bandwidth,
            "links": sum(self.cost.sent.values()) / chip.link,
        }
        if self.cost.transfers:
            times["network"] = self.cost.network / chip.network
        return times

    @property
    def step_seconds(self) -> float:
        """The roofline: the slowest of the `times`, if it hides the others."""
        return max(self.times.values())

    @property
    def serial_seconds(self) -> float:
        """Seconds of a step whose kernels run one at a time.

        Matmuls and custom calls take the slower of compute and HBM, element-wise kernels and copies
        take their HBM time, and collectives take the slower of links and HBM.
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
            + times.get("network", 0.0)
        )

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilization of a step that takes `seconds`.

        The peak is bfloat16's in every precision. MFU can exceed 1: by convention, model FLOPs
        count every key of the window for each query. The first queries of a row see fewer keys,
        and fused attention computes only those.
        """
        return self.model_flops / (PEAKS[self.chip][0] * seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def estimated_cycles(self) -> int:
        """Cycles of a step in the compiler's estimate; see cycles.py for what it leaves out."""
        return sum(kernel.cycles for kernel in self.kernels)

    def as_json(self) -> dict[str, Any]:
        return {
            "chip": self.chip,
            "devices": self.devices,
            "memory": asdict(self.memory) | {"fits": self.memory.fits},
            "flops": self.flops,
            "low_precision_flops": self.low_flops,
            "low_precision_matmuls": self.cost.low_precision,
            "model_flops": self.model_flops,
            "hbm_bytes": self.cost.hbm_bytes,
            "traffic": dict(self.cost.traffic),
            "collectives": {
                kind: {"calls": self.cost.calls[kind], "bytes_sent": self.cost.sent[kind]}
                for kind in self.cost.sent
            },
            "network": {"transfers": self.cost.transfers, "bytes_sent": self.cost.network},
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
            "estimated_cycles": self.estimated_cycles,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_step": self.tokens,
            "compile_seconds": self.compile_seconds,
        }


def tree_bytes(tree: Any) -> int:
    """Bytes of an abstract, sharded tree on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


class DoesNotFit(Exception):
    """The compiler failed: the program needs more memory than the device has."""


@dataclass(frozen=True)
class Target:
    """Devices to compile for."""

    chip: str  # a key of `CHIPS`
    mesh: Mesh  # of compile-only devices
    options: Mapping[str, str | bool] = field(default_factory=dict)  # XLA compiler options


@dataclass(frozen=True)
class Program:
    """A jitted step with its abstract, sharded arguments. FLOPs and tokens are over all devices."""

    step: jax.stages.Wrapped
    arguments: Sequence[Any]
    parameters: Any  # the part of the arguments that `Memory.parameters` counts
    state: Any  # the part of the arguments that `Memory.optimizer` counts
    flops: float
    model_flops: float
    tokens: int
    low_flops: float = 0.0  # the part of `flops` with float8 or int8 operands


def compile_plan(program: Program, target: Target) -> Plan:
    """Compile a program and return its plan.

    Raises `DoesNotFit` if the compiler reports that memory does not suffice (only on TPUs), and
    `UsageError` if the assembler for GPUs is missing.
    """
    began = time.perf_counter()
    compiled = _compile(program, target)
    stats, text = compiled.memory_analysis(), compiled.as_text()
    assert stats is not None and text is not None
    devices = target.mesh.size
    return Plan(
        chip=target.chip,
        devices=devices,
        memory=Memory(
            parameters=tree_bytes(program.parameters),
            optimizer=tree_bytes(program.state),
            temporary=stats.temp_size_in_bytes,
            total=program_bytes(stats) + stats.generated_code_size_in_bytes,
            limit=CHIPS[target.chip].hbm,
        ),
        flops=program.flops / devices,
        low_flops=program.low_flops / devices,
        model_flops=program.model_flops / devices,
        cost=hlo_cost(text),
        tokens=program.tokens,
        compile_seconds=time.perf_counter() - began,
        kernels=estimated_kernels(text),
    )


def _compile(program: Program, target: Target) -> jax.stages.Compiled:
    try:
        lowered = program.step.lower(*program.arguments)
        return lowered.compile(compiler_options=dict(target.options))
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            raise DoesNotFit(str(error).splitlines()[0]) from error
        if "No PTX compilation provider" in str(error):
            raise UsageError(
                "ptxas, the assembler for GPUs, is missing: "
                "pip install --no-deps nvidia-cuda-nvcc-cu12"
            ) from error
        raise


def train_plan(
    config: GPTConfig,
    step: jax.stages.Wrapped,
    state: TrainState,
    shardings: TrainState,
    shape: BatchShape,
    target: Target,
) -> Plan:
    """Return the plan of a train step from `make_train_step`, for the shapes of `state`."""
    state = abstract_tree(state, shardings)
    batch = abstract_batch(shape, target.mesh)
    platform = "tpu" if _is_tpu(target.chip) else "cuda"
    with assumed_cudnn():
        jaxpr = step.trace(state, batch).jaxpr
        program = Program(
            step,
            (state, batch),
            parameters=state.params,
            state=state.optimizer,
            flops=jaxpr_flops(jaxpr, config, platform=platform),
            low_flops=jaxpr_flops(jaxpr, config, platform=platform, low_precision=True),
            model_flops=float(flops_per_token(config)) * shape.tokens,
            tokens=shape.tokens,
        )
        return compile_plan(program, target)


def largest_batch(attempt: Callable[[int], Plan], rows: int) -> tuple[int, Plan]:
    """Return the largest number of rows per device whose plan fits, and that plan."""
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
            "one row per device does not fit: set `remat=block` or `remat=full`, `fsdp`, a larger "
            "slice, or a smaller `depth` or `max_seq_len`"
        )
    return best

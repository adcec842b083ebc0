"""Start-up of every script that uses JAX: platform, other processes, caches."""

import ctypes
import logging
import os
import sys
from dataclasses import dataclass

import jax

from nanochat_jax.cli import LARGEST, count, directory_name, flag
from nanochat_jax.errors import UsageError, one_line
from nanochat_jax.paths import CHECKPOINT_DIRS, Paths

# Options of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8

# Earlier ones miscompile concatenations, and add float32 with compare-and-swap loops before Hopper.
FIRST_GPU_JAX = (0, 11, 1)

log = logging.getLogger(__name__)

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # values of `device_type`

# The fraction of a GPU's memory that JAX takes. JAX's default is 0.75.
GPU_MEMORY, MEMORY_VARIABLES = "0.92", ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")

# XLA then adds in a fixed order instead of with atomics, and passes the wish on to cuDNN.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

# A process without a heartbeat for so long is considered dead, and the others exit. JAX's default
# is 100.
HEARTBEAT_SECONDS = 60


def _not_mps(name: str) -> str:
    if name == "mps":
        raise ValueError(
            "'mps', an Apple GPU, is not supported by JAX: leave this flag out, and the Mac's CPU "
            "computes"
        )
    return name


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Flags of every script that uses JAX."""

    device_type: str | None = flag(
        None, "platform to run on; default the best available", choices=PLATFORMS, check=_not_mps
    )


@dataclass(frozen=True, kw_only=True)
class Processes(DeviceFlags):
    """Flags of every script that can run as several processes, one per host."""

    mesh: str = flag("auto", "devices as DxM: D-way data and M-way tensor parallelism")
    coordinator: str | None = flag(
        None,
        "host:port of process 0, for a run of several processes; unnecessary where JAX detects "
        "them (Slurm, Open MPI, TPU slices)",
    )
    num_processes: int | None = count(
        None, "number of processes (with --coordinator)", at_most=10**6
    )
    process_id: int | None = flag(
        None, "index of this process, from 0 (with --coordinator)", at_least=0, at_most=10**6
    )
    deterministic: bool = flag(
        False,
        "on NVIDIA GPUs, only operations whose result does not vary: equal runs have equal bits; "
        "compilation and steps take longer",
    )


@dataclass(frozen=True, kw_only=True)
class ModelFlags(DeviceFlags):
    """Flags of every script that loads a model."""

    model_tag: str | None = flag(
        None,
        "name of the checkpoint directory; default the largest d<depth>",
        short="-g",
        check=directory_name,
    )
    step: int | None = flag(
        None,
        "step of the checkpoint; default the newest",
        short="-s",
        aliases=("model_step",),
        at_least=0,
        at_most=LARGEST,
    )
    dtype: str = flag("auto", "compute dtype", short="-d", choices=["auto", "float32", "bfloat16"])


@dataclass(frozen=True, kw_only=True)
class StageFlags(ModelFlags):
    """Flags of every script that loads the model of any stage."""

    source: str = flag("sft", "stage of the model", short="-i", choices=[*CHECKPOINT_DIRS])


@dataclass(frozen=True, kw_only=True)
class EngineFlags(StageFlags):
    """Flags of every script that generates with the model of any stage."""

    cache_dtype: str = flag(
        "auto",
        "dtype of keys and values; auto: the compute dtype, but float32 on a CPU",
        choices=["auto", "float32", "bfloat16"],
    )


def start(paths: Paths, flags: DeviceFlags | None = None, *, compile_cache: bool = True) -> None:
    """Set up JAX. Call once, before JAX is used.

    Args:
      flags: the platform, and the run's other processes if the script supports them.
      compile_cache: cache compiled programs under the base directory.
    """
    flags = flags or DeviceFlags()
    if not any(name in os.environ for name in MEMORY_VARIABLES):
        os.environ[MEMORY_VARIABLES[0]] = GPU_MEMORY
    if flags.device_type:
        jax.config.update("jax_platforms", flags.device_type)
    if isinstance(flags, Processes) and flags.deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}"
    _mallopt(M_ARENA_MAX, 1)  # one heap for all threads: others get large blocks from the kernel
    join_processes(flags if isinstance(flags, Processes) else Processes())
    jax.config.update("jax_enable_compilation_cache", compile_cache)
    jax.config.update("jax_compilation_cache_dir", str(paths.compile_cache))
    # Small programs too: those of loading a checkpoint take a second to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    platform = find_devices(flags.device_type)[0].platform
    if platform == "gpu" and jax.__version_info__ < FIRST_GPU_JAX:
        log.warning(
            f"JAX {jax.__version__} computes wrong or slow on some GPUs: use Python 3.12 or later "
            f"with JAX {'.'.join(map(str, FIRST_GPU_JAX))} or later"
        )
    if jax.process_index() > 0:  # process 0 logs for all; the others log warnings only
        logging.getLogger().setLevel(logging.WARNING)
    if platform == "cpu":
        # By default glibc returns XLA's large buffers to the kernel after every step and gets them
        # back page fault by page fault: a fifth to a third of a small model's training time. This
        # costs about twice a step's temporaries in memory, because of fragmentation.
        _mallopt(M_MMAP_MAX, 0)
        _mallopt(M_TRIM_THRESHOLD, -1)  # never


def find_devices(device_type: str | None = None) -> list[jax.Device]:
    """The devices of `device_type` (already applied), JAX_PLATFORMS, or the best platform.

    Raises `UsageError`, with the setting that is wrong, if there are none.
    """
    try:
        return jax.devices()
    # AssertionError, without a message, if the platform's plugin is missing
    except (RuntimeError, AssertionError) as error:
        variable = os.environ.get("JAX_PLATFORMS")
        cause = f" ({one_line(error).partition(' (set JAX_PLATFORMS')[0]})" if str(error) else ""
        if device_type:
            message = f"`device_type={device_type}`: JAX finds no such device here{cause}"
        elif variable:
            message = (
                f"JAX_PLATFORMS={variable}: JAX finds no such platform here{cause}: unset the "
                f"variable, or set it to one of {', '.join(PLATFORMS)}"
            )
        else:
            message = f"JAX finds no device{cause}: JAX_PLATFORMS=cpu runs on the CPU"
        raise UsageError(message) from error


def join_processes(flags: Processes) -> None:
    """Start `jax.distributed` if this is one process of several.

    Coordinator, number of processes and process id come from the flags or from
    `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.
    JAX finds them itself under Slurm, Open MPI, on TPU slices that name their workers in the
    environment, and with `NANOCHAT_DISTRIBUTED=1` (TPU VMs).

    Raises `UsageError` if values are missing, or under torchrun and similar launchers: each of
    their processes would train alone.
    """
    env = os.environ
    named = (flags.coordinator, flags.num_processes, flags.process_id)
    if named != (None, None, None):
        _join(*named, "`coordinator`, `num_processes` and `process_id`")
    elif "JAX_COORDINATOR_ADDRESS" in env:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        try:
            count, index = int(env[names[1]]), int(env[names[2]])
        except (KeyError, ValueError) as error:
            raise UsageError(
                "JAX_COORDINATOR_ADDRESS is set: JAX_NUM_PROCESSES and JAX_PROCESS_ID must be "
                f"numbers, got {env.get('JAX_NUM_PROCESSES')!r} and {env.get('JAX_PROCESS_ID')!r}"
            ) from error
        _join(env[names[0]], count, index, ", ".join(names))
    elif (
        env.get("NANOCHAT_DISTRIBUTED", "0") not in ("", "0")
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or any(_count(name) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    ):
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    elif "RANK" in env and (processes := _count("WORLD_SIZE")) > 1:
        raise UsageError(
            f"a launcher (torchrun?) started {processes} processes: start one per host without it, "
            f"for example with `mesh={processes}x1`; each process uses all GPUs of its host"
        )


def _count(variable: str) -> int:
    text = os.environ.get(variable) or "1"
    if not text.isdecimal():
        raise UsageError(
            f"{variable}={text}: expected a number of processes; unset it where no launcher sets it"
        )
    return int(text)


def _join(coordinator: str | None, count: int | None, index: int | None, names: str) -> None:
    host, _, port = (coordinator or "").rpartition(":")
    is_address = host and port.isdigit()
    if not is_address or count is None or index is None or not 0 <= index < count:
        raise UsageError(
            f"{names} must be HOST:PORT, a number N of processes and an index in 0..N-1, got "
            f"{coordinator!r}, {count} and {index}"
        )
    if count > 1:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )


def _mallopt(option: int, value: int) -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc
        libc.mallopt(option, value)


def release_memory() -> None:
    """Return unused memory to the kernel: a server's caches of changing lengths leave gaps."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)

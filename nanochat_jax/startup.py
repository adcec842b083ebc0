"""What every script that uses JAX does first: choose the platform, join the run's other processes, set up caches."""

import ctypes
import logging
import os
import sys
from dataclasses import dataclass

import jax

from nanochat_jax.cli import UsageError, flag
from nanochat_jax.paths import Paths

# Options of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8

PLATFORMS = ("", "cpu", "cuda", "rocm", "tpu")  # of --device-type


# A process that says nothing for so long is taken for dead, and the others end. JAX's own default is 100.
HEARTBEAT_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Flags of every script that can run as several processes, one per host."""

    coordinator: str = flag("", "host:port of process 0, for a run of several processes; see startup.py for what is found "
                                "without being told")
    num_processes: int = flag(0, "how many processes the run has (with --coordinator)")
    process_id: int = flag(-1, "which of them this one is, from 0 (with --coordinator)")


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Flags of every script that loads a model of ours."""

    model_tag: str | None = flag(None, "name of the checkpoint directory; default the largest d<depth>", short="-g")
    step: int | None = flag(None, "step of the checkpoint; default the newest", short="-s", aliases=("model_step",))
    dtype: str = flag("auto", "compute dtype", short="-d", choices=["auto", "float32", "bfloat16"])


def start(paths: Paths, *, device_type: str = "", compile_cache: bool = True, processes: Processes | None = None) -> None:
    """Call once, before JAX is used.

    Args:
      processes: what the command line says of the run's other processes.
      device_type: the platform to run on; "" takes the best there is.
      compile_cache: keep compiled programs under the base directory, so that the next start does not compile.
    """
    if device_type:
        jax.config.update("jax_platforms", device_type)
    _one_heap()
    join_processes(processes or Processes())
    jax.config.update("jax_enable_compilation_cache", compile_cache)
    jax.config.update("jax_compilation_cache_dir", str(paths.compile_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        platform = jax.devices()[0].platform
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, where the platform's plugin is missing
        if not device_type:
            raise
        raise UsageError(f"--device-type {device_type}: JAX finds no such device here {str(error)[:150]}".rstrip()) from error
    if jax.process_index() > 0:  # process 0 speaks for all; what goes wrong is still said
        logging.getLogger().setLevel(logging.WARNING)
    if platform == "cpu":
        _keep_memory()


def join_processes(flags: Processes) -> None:
    """Start `jax.distributed` if this is one process of several.

    Either the flags or the environment say which one (`JAX_COORDINATOR_ADDRESS`, host:port of process 0,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`); or JAX finds out, under Slurm, Open MPI or on TPU slices that name their
    workers in the environment. `NANOCHAT_DISTRIBUTED=1` makes JAX look where none of these variables is set (TPU VMs).
    """
    env = os.environ
    named = (flags.coordinator, flags.num_processes, flags.process_id)
    if named != (Processes.coordinator, Processes.num_processes, Processes.process_id):
        _join(*named, "--coordinator, --num-processes and --process-id")
    elif "JAX_COORDINATOR_ADDRESS" in env:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        try:
            count, index = int(env[names[1]]), int(env[names[2]])
        except (KeyError, ValueError) as error:
            raise UsageError("JAX_COORDINATOR_ADDRESS is set: JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers too, "
                             f"found {env.get('JAX_NUM_PROCESSES')!r} and {env.get('JAX_PROCESS_ID')!r}") from error
        _join(env[names[0]], count, index, ", ".join(names))
    elif (env.get("NANOCHAT_DISTRIBUTED", "0") not in ("", "0") or "MEGASCALE_COORDINATOR_ADDRESS" in env
          or "," in env.get("TPU_WORKER_HOSTNAMES", "")
          or any(int(env.get(name, "1")) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))):
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def _join(coordinator: str, count: int, index: int, said_by: str) -> None:
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit() and count >= 1 and 0 <= index < count):
        raise UsageError(f"{said_by} must be host:port, a number of processes and one of 0 to that less 1, found "
                         f"{coordinator!r}, {count} and {index}")
    if count > 1:
        jax.distributed.initialize(coordinator, count, index, cluster_detection_method="deactivate",
                                   heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def _mallopt(option: int, value: int) -> None:
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(option, value)


def _one_heap() -> None:
    """Before there are threads: those that have heaps of their own take anything large from the kernel, each time anew."""
    _mallopt(M_ARENA_MAX, 1)


def _keep_memory() -> None:
    """Let the allocator keep what a step frees. By default glibc gives XLA's large buffers back to the kernel after every
    step and takes them again, page fault by page fault: a fifth to a third of a small model's training time on a CPU. The
    price is memory, about twice a step's temporaries, because what is kept lies in pieces."""
    _mallopt(M_MMAP_MAX, 0)
    _mallopt(M_TRIM_THRESHOLD, -1)  # never


def release_memory() -> None:
    """Give the kernel what the allocator kept and nothing uses: for a server, whose caches of changing lengths leave holes.

    Takes 20 to 150 ms in which no other thread can allocate.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)

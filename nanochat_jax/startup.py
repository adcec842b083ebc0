"""What every script that uses JAX does first."""

import ctypes
import sys

import jax

from nanochat_jax.paths import Paths

# Options of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def start(paths: Paths) -> None:
    """Keep compiled programs under the base directory, so that the next start of the same stage does not compile."""
    jax.config.update("jax_compilation_cache_dir", str(paths.compile_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if jax.devices()[0].platform == "cpu" and sys.platform == "linux":
        _keep_memory()


def _keep_memory() -> None:
    """Let the allocator keep what a step frees. By default glibc gives XLA's large buffers back to the kernel after every
    step and takes them again, page fault by page fault: a fifth of a small model's training time on a CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_ARENA_MAX, 1)

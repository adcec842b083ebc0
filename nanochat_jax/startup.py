"""What every script that uses JAX does first."""

import jax

from nanochat_jax.paths import Paths


def start(paths: Paths) -> None:
    """Keep compiled programs under the base directory, so that the next start of the same stage does not compile."""
    jax.config.update("jax_compilation_cache_dir", str(paths.compile_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

"""Run a command in this process, as if it had its own."""

import contextlib
import io
import logging
import runpy
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from nanochat_jax import devices

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@contextlib.contextmanager
def settings_restored():
    """Restore what a command changes for its process: JAX's settings, signal hooks, logging."""
    saved = {name: getattr(jax.config, name) for name in SETTINGS}
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with pytest.MonkeyPatch.context() as patch:
            for hook in ("excepthook", "unraisablehook"):
                patch.setattr(sys, hook, getattr(sys, hook))
            patch.setattr(devices, "_mallopt", lambda option, value: None)
            yield patch
    finally:
        root.handlers[:], root.level = handlers, level
        for name, value in saved.items():
            jax.config.update(name, value)


def run_here(module: str, *argv: str, base: Path | str = "", **environment: str) -> Ended:
    """`python -m MODULE ARGV` with `base` as the base directory."""
    out, err = io.StringIO(), io.StringIO()
    with (
        settings_restored() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # of runpy: the module is imported already
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", [module, *argv])
        patch.setattr(sys, "orig_argv", [sys.executable, "-m", module, *argv])
        code = None
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = ended.code
    return Ended(code or 0, out.getvalue(), err.getvalue())

"""What every test shares: eight virtual CPU devices, and where the reference data is."""

import os

# Before anything imports JAX.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import atexit  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests look for what is left in the directory of temporary files: each worker has its own.
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="pytest-worker-")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Started with `nohup ... &`, as some CI systems do, SIGINT is ignored here and in all
    # processes that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """Processes for `-n auto`: one per core, and 4 GB of memory for each."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, memory // 2**32))


# Folders that spend their time in the compiler, on small programs.
QUICK = {"infer", "serve", "eval", "model", "interop", "train"}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Compile without most optimizations where no test looks at compiled programs.

    Parity with upstream is checked on the programs that users run.
    """
    if request.path.parent.name not in QUICK or request.path.name == "test_golden.py":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of reference data (`data/`, `golden/`); without it its tests are skipped."""
    folder = os.environ.get("NANOCHAT_TEST_DATA")
    if not folder:
        pytest.skip("NANOCHAT_TEST_DATA is not set: no reference data")
    return Path(folder)

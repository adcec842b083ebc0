import os
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of shared reference data."""
    root = os.environ.get("NANOCHAT_TEST_DATA")
    if not root:
        pytest.skip("NANOCHAT_TEST_DATA is unset: reference tensors are not in the repository")
    return Path(root)

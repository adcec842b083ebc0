"""Start-up: what is set before JAX starts."""

import os

import pytest
from command import settings_restored

from nanochat_jax import devices
from nanochat_jax.devices import DETERMINISTIC, Processes
from nanochat_jax.errors import UsageError
from nanochat_jax.paths import Paths

VARIABLES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")


@pytest.mark.parametrize(
    "name, value", [(None, "0.92"), (VARIABLES[0], "0.5"), (VARIABLES[1], "1")]
)
def test_gpus_give_92_percent_of_their_memory_unless_a_variable_says_otherwise(
    tmp_path, name, value
):
    with settings_restored() as patch:
        for variable in VARIABLES:
            patch.delenv(variable, raising=False)
        if name:
            patch.setenv(name, value)
        devices.start(Paths(tmp_path))
        assert {os.environ[v] for v in VARIABLES if v in os.environ} == {value}
        os.environ.pop(VARIABLES[0], None)


def test_deterministic_adds_to_the_flags_of_xla(tmp_path):
    with settings_restored() as patch:
        patch.setenv("XLA_FLAGS", "--xla_dump_to=x")
        devices.start(Paths(tmp_path), Processes(deterministic=True))
        assert os.environ["XLA_FLAGS"].split() == ["--xla_dump_to=x", DETERMINISTIC]


def test_a_launcher_of_one_process_per_gpu_is_refused_and_one_process_is_not(monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"8 processes: start one per host.*`mesh=8x1`"):
        devices.join_processes(Processes())
    monkeypatch.setenv("WORLD_SIZE", "1")
    devices.join_processes(Processes())

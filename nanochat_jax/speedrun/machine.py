"""The devices that the stages will run on."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import jax

from nanochat_jax.devices import find_devices
from nanochat_jax.errors import UsageError
from nanochat_jax.metrics import peak_flops
from nanochat_jax.model.precision import has_units

MODEL_FLOPS_UTILIZATION = 0.4  # assumed if the device's peak is known
# float32 training on x86 cores: 5e10 on a busy machine to 1.1e11 on an idle one
CPU_FLOPS_PER_CORE = 8e10


def describe_devices(device_type: str | None) -> None:
    """Print platform, kind, count, peak FLOP/s and float8 units of the devices as a JSON line."""
    if device_type:
        jax.config.update("jax_platforms", device_type)
    devices = find_devices(device_type)
    first = devices[0]
    float8 = has_units("fp8", first)
    print(json.dumps([first.platform, first.device_kind, len(devices), peak_flops(first), float8]))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices of one platform. `peak_flops` is per device; None if unknown.

    `float8`: the devices multiply in float8 faster than in bfloat16.
    """

    platform: str
    kind: str
    count: int
    peak_flops: float | None
    float8: bool = False

    @classmethod
    def probe(cls, device_type: str | None = None) -> "Machine":
        """Detect this machine's devices, in a child process: only one process can hold a TPU."""
        code = (
            "from nanochat_jax import cli; from nanochat_jax.speedrun import machine; "
            f"cli.guard(lambda: machine.describe_devices({device_type!r}))"
        )
        probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if probe.returncode:
            errors = [line for line in probe.stderr.splitlines() if line.startswith("error: ")]
            raise UsageError(
                errors[0].removeprefix("error: ")
                if errors
                else f"JAX does not start on this machine: {probe.stderr}"
            )
        platform, kind, count, peak, float8 = json.loads(probe.stdout.splitlines()[-1])
        return cls(platform=platform, kind=kind, count=count, peak_flops=peak, float8=float8)

    @property
    def training_flops(self) -> float:
        """Expected FLOP/s of all devices together."""
        if self.platform == "cpu":
            return CPU_FLOPS_PER_CORE * (os.cpu_count() or 1)
        return (self.peak_flops or 1e14) * MODEL_FLOPS_UTILIZATION * self.count

"""What is known of the machine's devices."""

from types import SimpleNamespace

import pytest

from nanochat_jax.metrics import PEAK_FLOPS, peak_bandwidth, peak_flops


@pytest.mark.parametrize("kind, flops, bandwidth", [
    ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12), ("NVIDIA H100 PCIe", 756e12, 2.0e12), ("NVIDIA H200 NVL", 836e12, 4.8e12),
    ("NVIDIA H800 NVL", 989e12, 3.35e12), ("NVIDIA A100-SXM4-80GB", 312e12, 2.0e12), ("NVIDIA L40S", 362e12, 864e9),
    ("NVIDIA GeForce RTX 4090", 165.2e12, 1.01e12), ("AMD Instinct MI300X", 1.3074e15, 5.3e12), ("TPU v5 lite", 197e12, 819e9),
    ("TPU v5p", 459e12, 2.765e12), ("TPU v6e", 918e12, 1.64e12),
    ("NVIDIA RTX A4000", None, None), ("NVIDIA RTX A3000 Laptop GPU", None, None)])
def test_a_devices_peak_is_found_by_whole_words(kind, flops, bandwidth):
    device = SimpleNamespace(platform="gpu", device_kind=kind)
    assert (peak_flops(device), peak_bandwidth(device)) == (flops, bandwidth)


def test_every_device_of_known_flops_has_a_known_bandwidth():
    for name in PEAK_FLOPS:
        assert peak_bandwidth(SimpleNamespace(platform="gpu", device_kind=name)), name
    assert peak_flops(SimpleNamespace(platform="cpu", device_kind="NVIDIA H100")) is None

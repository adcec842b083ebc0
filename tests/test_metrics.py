"""What is known of the machine's devices, and reading of metrics.jsonl."""

import json
import sys
from types import SimpleNamespace

import pytest

from nanochat_jax.errors import UsageError
from nanochat_jax.metrics import MetricsLog, peak_bandwidth, peak_flops, read_metrics, start_tracker


@pytest.mark.parametrize(
    "kind, flops, bandwidth",
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H100 PCIe", 756e12, 2.0e12),
        ("NVIDIA H200 NVL", 836e12, 4.8e12),
        ("NVIDIA H800 NVL", 989e12, 3.35e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.0e12),
        ("NVIDIA L40S", 362e12, 864e9),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 1.01e12),
        ("AMD Instinct MI300X", 1.3074e15, 5.3e12),
        ("TPU v5 lite", 197e12, 819e9),
        ("TPU v5p", 459e12, 2.765e12),
        ("TPU v6e", 918e12, 1.64e12),
        ("NVIDIA RTX A4000", None, None),
        ("NVIDIA RTX A3000 Laptop GPU", None, None),
    ],
)
def test_a_devices_peak_is_found_by_whole_words(kind, flops, bandwidth):
    device = SimpleNamespace(platform="gpu", device_kind=kind)
    assert (peak_flops(device), peak_bandwidth(device)) == (flops, bandwidth)


@pytest.mark.parametrize(
    "damage",
    [
        bytes(40),
        b'{"step": 1, "lo',
        b"[" * 10_000,
        b'{"step": 1' + b"0" * 5_000 + b"}",
        b"\xff\xfe\x80",
        b"[]",
        b"1",
        b'"step"',
        b"null",
        b'{"kind": "train"}',
        b'{"step": "x"}',
        b'{"step": NaN}',
    ],
    ids=lambda line: repr(line[:16]),
)
def test_a_damaged_line_is_left_out_with_a_warning_wherever_it_is(tmp_path, caplog, damage):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "kind": "train", "loss": 1.5} for step in range(3)]
    lines = [json.dumps(row).encode() for row in rows]
    for at in range(4):
        path.write_bytes(
            b"\n".join([*lines[:at], damage, *lines[at:]]) + (b"\n" if at < 3 else b"")
        )
        caplog.clear()
        assert read_metrics(path) == rows and f"{path}: skipped 1 damaged lines" in caplog.text
        log = MetricsLog(path, resume_step=2)  # a resumed run writes what is left
        log.write(step=2, kind="train")
        log.close()
        assert path.read_text().splitlines() == [
            json.dumps(row) for row in [*rows[:2], {"step": 2, "kind": "train"}]
        ]


def test_zeros_before_a_line_do_not_take_it_along(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(bytes(40) + b'{"step": 1}\r\n')
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize(
    "tracker, run, module, name",
    [
        (None, "dummy", None, None),
        (None, "mine", "wandb", "mine"),
        ("wandb", "dummy", "wandb", "d4"),
        ("trackio", "dummy", "trackio", "d4"),
        ("trackio", "mine", "trackio", "mine"),
        ("none", "mine", None, None),
    ],
)
def test_a_tracker_gets_the_numbers_of_a_run(tracker, run, module, name, monkeypatch, tmp_path):
    calls = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(options) or fake,
        log=lambda numbers, step: calls.append((numbers, step)),
    )
    for other in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, other, fake if other == module else None)
    started = start_tracker(tracker, run, "nanochat-base", "d4", {"depth": 4})
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=None, tracker_run=started)
    log.write(step=3, kind="train", loss=1.5, mfu="n/a")
    log.close()
    expected = [{"project": "nanochat-base", "name": name, "config": {"depth": 4}}]
    assert calls == ([*expected, ({"train/loss": 1.5}, 3)] if module else [])


@pytest.mark.parametrize(
    "tracker, run, message",
    [
        (None, "x", "`run=x` logs to Weights & Biases, which is not installed .*pip install wandb"),
        ("trackio", "x", "`tracker=trackio` logs to Trackio, .*`pip install trackio`"),
    ],
)
def test_a_missing_tracker_is_an_error_with_its_remedy(tracker, run, message, monkeypatch):
    for module in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=message):
        start_tracker(tracker, run, "p", "d4", {})

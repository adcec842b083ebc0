"""The inference benchmark: a table, then one JSON line whose figures agree."""

import json
import math
from pathlib import Path

import jax
import pytest

from nanochat_jax.checkpoint import Loaded
from nanochat_jax.errors import UsageError
from nanochat_jax.infer import bench as infer_bench
from nanochat_jax.infer.bench import flops_per_token, keys_read
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import init_params
from scripts import infer_bench as script
from scripts.infer_bench import Config

MODEL = GPTConfig.classic(1, vocab_size=320, sequence_len=64, n_embd=32, n_head=2, n_kv_head=1)


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
    def run(**options):
        loaded = Loaded(
            MODEL, init_params(MODEL, jax.random.key(0)), None, {}, Path("d2"), 7, "base"
        )
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
        monkeypatch.setattr(script, "start", lambda *_, **__: None)
        monkeypatch.setattr(script, "load_model", lambda *_, **__: loaded)
        script.main(Config(**options))
        return capsys.readouterr().out.splitlines()

    return run


def test_the_last_line_is_json_and_agrees_with_the_table(bench):
    *table, last = bench(prompt_tokens=10_000, decode_tokens=20, batch_sizes="1,3", mesh="2x1")
    found = json.loads(last)
    assert (found["source"], found["step"], found["prompt_tokens"]) == ("base", 7, 64 - 20)
    # a CPU
    assert (
        found["peak_flops_per_sec"]
        is found["sweep"][0]["mbu_percent"]
        is found["prefill"]["mfu_percent"]
        is None
    )
    assert [row["batch_size"] for row in found["sweep"]] == [1, 3]
    for row, line in zip(found["sweep"], table[-2:], strict=True):
        assert row["decode_steps"] == 16
        assert (
            line.split()[0] == str(row["batch_size"])
            and line.split()[3] == f"{row['tok_per_sec']:,.0f}"
        )
        assert 0 < row["tpot_sec"] < 10 and row["ttft_sec"] > 0
    assert math.isclose(
        found["prefill"]["tok_per_sec"] * found["prefill"]["time_sec"], found["prompt_tokens"] - 1
    )


def test_shares_of_the_peaks_where_those_are_known(bench, monkeypatch):
    monkeypatch.setattr(infer_bench, "peak_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(infer_bench, "peak_flops", lambda device: 1e12)
    found = json.loads(bench(prompt_tokens=20, decode_tokens=9, batch_sizes="2")[-1])
    row = found["sweep"][0]
    read = found["weight_bytes"] + 2 * found["kv_read_bytes_per_step"]
    assert math.isclose(row["mbu_percent"], 100 * read / row["tpot_sec"] / 1e9)
    assert math.isclose(
        found["ceiling_bs1_tok_per_sec"],
        1e9 / (found["weight_bytes"] + found["kv_read_bytes_per_step"]),
    )
    assert math.isclose(
        row["mfu_percent"], 100 * 2 * found["decode_flops_per_token"] / row["tpot_sec"] / 1e12
    )


def test_operations_and_keys_by_hand():
    config = GPTConfig.classic(2, vocab_size=100, sequence_len=64)  # width 128, one head
    assert keys_read(config, 10) == 20
    weights = 2 * 12 * 128 * 128
    assert flops_per_token(config, 10, unembed=False) == 2 * weights + 4 * 128 * 20
    assert flops_per_token(config, 10, unembed=True) == 2 * (weights + 100 * 128) + 4 * 128 * 20
    windowed = GPTConfig.modern(4, sequence_len=1024)
    assert keys_read(windowed, 800) == 3 * (256 + 1) + 800


def test_a_reply_longer_than_the_context_is_refused(bench):
    with pytest.raises(UsageError, match="`decode_tokens=256` leaves no room"):
        bench(decode_tokens=256)

"""Embedding tables in bfloat16 learn as in float32, resume exactly, and are saved as float32."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_line import make_base

from nanochat_jax.checkpoint import load_model
from nanochat_jax.metrics import read_metrics
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.train.pretrain import BaseTrainConfig, pretrain
from nanochat_jax.train.setup import table_dtype

CONFIG = BaseTrainConfig(
    depth=2,
    aspect_ratio=16,
    head_dim=4,
    max_seq_len=64,
    total_batch_size=512,
    device_batch_size=4,
    num_iterations=6,
    eval_every=-1,
    save_every=3,
    eval_tokens=512,
    sample_every=-1,
    lr_scale=0.1,
    mesh="2x1",
)


def train(paths, tag, **changes):
    pretrain(dataclasses.replace(CONFIG, model_tag=tag, **changes))
    return read_metrics(paths.checkpoints("base") / tag / "metrics.jsonl")


def test_bfloat16_tables_learn_resume_exactly_and_are_saved_as_float32(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    paths = make_base(tmp_path)
    plain = train(paths, "plain")
    rows = train(paths, "short", table_dtype="bfloat16")
    assert rows[-1]["val_bpb"] == pytest.approx(plain[-1]["val_bpb"], abs=0.01)

    loaded = load_model(paths, "base", tag="short").params
    for name in ("wte", "value_embeds"):
        table = loaded[name]
        assert table.dtype == jnp.float32  # as other programs and older runs expect
        np.testing.assert_array_equal(table, table.astype(jnp.bfloat16).astype(jnp.float32))
    matrices = loaded["blocks"]["c_q"]
    assert (matrices != matrices.astype(jnp.bfloat16).astype(jnp.float32)).any()

    shutil.rmtree(paths.checkpoints("base") / "short" / "6")  # as if killed before the last save
    again = train(paths, "short", table_dtype="bfloat16", resume=True)
    losses = [[row["loss"] for row in each if row["kind"] == "train"] for each in (rows, again)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    # a run may change the dtype when it is resumed
    assert train(paths, "short", resume=True, num_iterations=7)[-1]["step"] == 7


@pytest.mark.parametrize("arch", ["modern", "classic"])
def test_tables_are_float32_on_a_cpu_and_where_asked_for(arch):
    model = getattr(GPTConfig, arch)(2, sequence_len=64, vocab_size=64)
    compute = Compute(dtype=jnp.bfloat16)  # of the CPU
    assert jax.devices()[0].platform == "cpu"
    assert table_dtype(CONFIG, model, compute) == jnp.float32
    asked = dataclasses.replace(CONFIG, table_dtype="bfloat16")
    assert table_dtype(asked, model, compute) == jnp.bfloat16

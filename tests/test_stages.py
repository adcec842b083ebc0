"""The training scripts on a small corpus of their own: each stage reads the one before it, and resumes bit for bit."""

import importlib.util
import random
import shutil

import pytest

from nanochat_jax.data.shards import write_shards
from nanochat_jax.metrics import read_metrics
from nanochat_jax.paths import Paths
from nanochat_jax.tokenizer import Tokenizer
from scripts import base_train, chat_sft, mid_train

WORDS = ["apple", "banana", "river", "mountain", "letter", "window", "garden", "silver", "people", "government", "summer"] * 3
needs_chitchat = pytest.mark.skipif(importlib.util.find_spec("chitchat_dataset") is None, reason="the extra offline")
COMMON = dict(mesh="1x1", total_batch_size=256, device_batch_size=2, num_iterations=6, save_every=3, keep=3,
              eval_every=-1, eval_tokens=256, model_tag="d2")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    rng = random.Random(0)
    texts = [" ".join(rng.choice(WORDS) for _ in range(60)) for _ in range(60)]
    paths = Paths(base)
    write_shards(texts[:50], paths.data("embedded"), val_texts=texts[50:], rows_per_shard=25)
    (paths.data("embedded") / "words.txt").write_text("\n".join(dict.fromkeys(
        WORDS + [a + b for a in ("over", "under", "out") for b in WORDS])))
    Tokenizer.train(texts, 300).save(paths.tokenizer)
    return paths


@needs_chitchat
@pytest.mark.slow
def test_every_stage_builds_on_the_one_before_and_resumes_bit_for_bit(paths, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(paths.base))
    for source, script, config in (
        ("base", base_train, lambda **more: base_train.BaseTrainConfig(
            depth=2, aspect_ratio=16, head_dim=16, max_seq_len=64, data="embedded", **COMMON, **more)),
        ("mid", mid_train, lambda **more: mid_train.MidTrainConfig(**COMMON, **more)),
        ("sft", chat_sft, lambda **more: chat_sft.ChatSFTConfig(**COMMON, **more)),
    ):
        directory = paths.checkpoints(source) / "d2"
        script.main(config())
        first = [line["loss"] for line in read_metrics(directory / "metrics.jsonl") if line["kind"] == "train"]
        shutil.rmtree(directory / "6")  # as if killed before the last save
        script.main(config(resume=True))
        second = [line["loss"] for line in read_metrics(directory / "metrics.jsonl") if line["kind"] == "train"]
        assert len(first) == 6 and first == second, source

"""The scripts that train the tokenizer and measure its compression."""

import json
import shutil
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.eval import compression
from nanochat_jax.paths import Paths
from nanochat_jax.tokenizer import Tokenizer
from scripts import tok_eval, tok_train

TEXTS = [
    "The quick brown fox jumps over the lazy dog; it's 1234567 o'clock.\n" * 20,
    "naïve café — 日本語 \t\r\n\n x " * 20,
]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base directory with two training shards and one for validation."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    documents = [["aaaa bbbb" * 10, TEXTS[0]], [TEXTS[1]], ["zqzqzqzq " * 50]]
    for index, texts in enumerate(documents):
        path = Paths(tmp_path).data("embedded") / f"shard_{index:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": texts}), path, row_group_size=1)
    return Paths(tmp_path)


def test_tok_train_saves_a_tokenizer_and_reports(base, capsys):
    tok_train.main(tok_train.Config(vocab_size=300))
    tokenizer = Tokenizer.load(base.tokenizer)
    assert tokenizer.vocab_size == 300
    assert b"zq" not in tokenizer.mergeable_ranks
    section = json.loads((base.report / "tokenizer-training.json").read_text())
    assert section["stage"] == "tok_train"
    assert section["results"]["vocab_size"] == 300
    assert section["results"]["token_bytes_min"] == 1
    assert "300 tokens" in capsys.readouterr().out


def test_tok_eval_measures_compression_against_the_baselines(base, monkeypatch, capsys):
    tok_train.main(tok_train.Config(vocab_size=300))
    bytes_only = tiktoken.Encoding(
        "bytes",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bytes_only)
    tok_eval.main(tok_eval.Config())
    results = json.loads((base.report / "tokenizer-evaluation.json").read_text())["results"]
    tokens = len(Tokenizer.load(base.tokenizer).encode("zqzqzqzq " * 50))
    assert results["bytes_per_token_val"] == pytest.approx(450 / tokens)
    assert results["gpt2_bytes_per_token_val"] == 1.0
    shown = capsys.readouterr().out
    assert "GPT-2 256" in shown and "GPT-4 256" in shown


@pytest.mark.parametrize("hangs", [False, True])
def test_tok_eval_without_a_network_says_so_and_goes_on(base, monkeypatch, capsys, hangs):
    def get_encoding(name):
        if hangs:
            time.sleep(3600)
        raise ConnectionError("unreachable")

    tok_train.main(tok_train.Config(vocab_size=300))
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    monkeypatch.setattr(compression, "DOWNLOAD_SECONDS", 0.1)
    tok_eval.main(tok_eval.Config())
    results = json.loads((base.report / "tokenizer-evaluation.json").read_text())["results"]
    assert results["bytes_per_token_news"] > 1
    assert not any(name.startswith("gpt2") for name in results)
    shown = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "No comparison with GPT-2 and GPT-4" in line
    ]
    assert len(shown) == 1 and ("TimeoutError" if hangs else "ConnectionError") in shown[0]


def test_tok_train_refuses_a_small_vocabulary_a_bad_shard_and_no_data(base):
    with pytest.raises(UsageError, match="at least 265"):
        tok_train.main(tok_train.Config(vocab_size=100))
    shard = base.data("embedded") / "shard_00000.parquet"
    content = bytearray(shard.read_bytes())
    content[4:40] = bytes(36)  # the pages are broken, the footer is not
    shard.write_bytes(content)
    with pytest.raises(UsageError, match="shard_00000.parquet"):
        tok_train.main(tok_train.Config(vocab_size=300))
    shard.write_bytes(content[:-5])
    with pytest.raises(UsageError, match="shard_00000.parquet"):
        tok_train.main(tok_train.Config(vocab_size=300))
    shutil.rmtree(base.data("embedded"))
    with pytest.raises(NotFound):
        tok_train.main(tok_train.Config())

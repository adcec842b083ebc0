"""Models of transformers under our evaluation give the scores that ours give."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `torch`")
transformers = pytest.importorskip("transformers", reason="needs the extra `torch`")

from random_model import random_params  # noqa: E402

from nanochat_jax.data.loader import pretraining_loader  # noqa: E402
from nanochat_jax.data.shards import write_shards  # noqa: E402
from nanochat_jax.errors import NotFound, UsageError  # noqa: E402
from nanochat_jax.eval.base_model import BaseEvalConfig  # noqa: E402
from nanochat_jax.eval.base_model import evaluate_base as base_eval  # noqa: E402
from nanochat_jax.eval.bpb import held_out_loss  # noqa: E402
from nanochat_jax.eval.hf_model import HFModel  # noqa: E402
from nanochat_jax.eval.scoring import Row, Scorer  # noqa: E402
from nanochat_jax.interop.hf import write_hf  # noqa: E402
from nanochat_jax.model.compute import Compute  # noqa: E402
from nanochat_jax.model.config import GPTConfig  # noqa: E402
from nanochat_jax.model.sharding import make_mesh  # noqa: E402
from nanochat_jax.tokenizer import Tokenizer  # noqa: E402

TOKENIZER = Tokenizer.train(
    ["the river and the mountain, the letter and the silver window"] * 9, 280
)
CONFIG = GPTConfig.classic(
    2, n_embd=64, n_head=2, n_kv_head=1, sequence_len=64, vocab_size=TOKENIZER.vocab_size
)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0.2)


@pytest.fixture(scope="module")
def directory(params, tmp_path_factory):
    place = tmp_path_factory.mktemp("hf")
    write_hf(place, CONFIG, params, TOKENIZER)
    return place


def examples():
    rng = np.random.default_rng(1)
    for key in range(8):
        prefix = rng.integers(0, 270, 1 + 9 * key)
        rows = [
            np.r_[prefix, rng.integers(0, 270, n)].astype(np.int32) for n in rng.integers(1, 9, 3)
        ]
        yield key, [Row(tokens, len(prefix), len(tokens)) for tokens in rows]


@pytest.mark.parametrize("tokens", [1, 200])
def test_scores_are_ours(directory, params, tokens):
    theirs = dict(HFModel(directory, tokens=tokens)(examples()))
    ours = dict(Scorer(config=CONFIG, params=params, num_rows=2)(examples()))
    assert list(theirs) == list(range(8)) and len(theirs[0]) == 3
    for key, scores in theirs.items():
        for score, other in zip(scores, ours[key], strict=True):
            np.testing.assert_allclose(score.mean_nll, other.mean_nll, rtol=1e-4)
            assert score.all_argmax == other.all_argmax


def test_tokens_and_bits_per_byte_are_ours(directory, params, tmp_path):
    model, mesh = HFModel(directory, tokens=100), make_mesh("1x1")
    texts = ["the letter <|bos|> and <|user_start|>", "Münchën 😀 the", ""]
    assert model.tokenizer.encode(texts, prepend=model.tokenizer.bos_id) == TOKENIZER.encode(
        texts, prepend=TOKENIZER.bos_id
    )
    write_shards(
        ["the river and the mountain " * 9] * 40,
        tmp_path,
        val_texts=["the silver window " * 9] * 40,
        rows_per_shard=20,
    )
    found = model.bits_per_byte(tmp_path, rows=4, split_tokens=512)
    for split in ("train", "val"):
        batches = pretraining_loader(
            tmp_path, TOKENIZER, split=split, batch_size=4, sequence_len=64, num_shards=1
        )
        ours = held_out_loss(
            params,
            batches,
            2,
            config=CONFIG,
            token_bytes=TOKENIZER.token_bytes(),
            compute=Compute(mesh=mesh),
        )
        batches.close()
        assert found[f"{split}_bpb"] == pytest.approx(ours.bpb, rel=1e-4)


def test_learned_positions_are_not_left(directory, tmp_path):
    """Prompts beyond the 32 positions give what their end alone gives."""
    config = transformers.GPT2Config(
        vocab_size=TOKENIZER.vocab_size,
        n_positions=32,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=TOKENIZER.bos_id,
        eos_token_id=TOKENIZER.bos_id,
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, tmp_path)
    model = HFModel(tmp_path, tokens=1)
    tokens = np.arange(60, dtype=np.int32)
    ((_, (whole, end)),) = model([(0, [Row(tokens, 55, 60), Row(tokens[28:], 27, 32)])])
    assert whole.mean_nll == pytest.approx(end.mean_nll, rel=1e-6)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(NotFound, match="no config.json"):
        HFModel(tmp_path, tokens=1)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(UsageError, match="cannot load it"):
        HFModel(tmp_path, tokens=1)


def test_base_eval_reports_a_model_of_transformers(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    bundle = tmp_path / "eval_bundle"
    (bundle / "eval_data").mkdir(parents=True)
    (bundle / "core.yaml").write_text(
        "icl_tasks:\n- {label: yes_no, dataset_uri: y.jsonl, num_fewshot: [1], icl_task_type: "
        "multiple_choice}"
    )
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nyes_no,50\n")
    rows = [{"query": f"{i}?", "choices": ["yes", "no"], "gold": i % 2} for i in range(5)]
    (bundle / "eval_data" / "y.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base_eval(BaseEvalConfig(hf_path=str(directory), eval="core,sample"))
    logged = json.loads((tmp_path / "report" / "base-model-evaluation.json").read_text())
    assert set(logged["results"]) == {"core", "yes_no"} and str(directory) in logged["items"][0]
    assert (tmp_path / "base_eval" / f"{str(directory).strip('/').replace('/', '-')}.csv").is_file()

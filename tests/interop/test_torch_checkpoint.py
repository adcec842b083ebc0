"""Weights in and out without torch: nanochat's files, Hugging Face's files, and damaged ones."""

import dataclasses
import json
import pickle
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
from interop_models import MODELS, VOCABULARY, assert_same, random_params
from safetensors.numpy import load_file, save_file

from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.interop.hf import read_hf, write_hf
from nanochat_jax.interop.torch_checkpoint import (
    read_checkpoint,
    read_tokenizer,
    upstream_shape,
    write_checkpoint,
)
from nanochat_jax.interop.torch_file import read_encoding, read_pt, write_pt
from nanochat_jax.model import weights
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import import_weights

CLASSIC = dataclasses.replace(MODELS["classic"], rotary_dtype="float32")


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """Rewrite a zip file with `change(name, content)` of each member."""
    with zipfile.ZipFile(path) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def change_pickle(path, old, new):
    def change(name, content):
        assert not name.endswith("data.pkl") or old in content
        return content.replace(old, new) if name.endswith("data.pkl") else content

    rewrite(path, change)


@pytest.mark.parametrize("arch", MODELS)
def test_an_exported_checkpoint_comes_back_identical(model, exported):
    config, params = model
    imported = read_checkpoint(exported)
    assert (imported.config, imported.step, imported.meta["val_bpb"]) == (config, 12, 1.5)
    assert imported.tokenizer.fingerprint() == VOCABULARY.fingerprint()
    assert_same(imported.params, params)
    meta = json.loads((exported / "meta_000012.json").read_text())
    fields = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"}
    assert set(meta["model_config"]) - {"window_pattern"} == fields
    assert ("window_pattern" in meta["model_config"]) == (config.arch == "modern")
    assert read_checkpoint(exported, step=7).step == 7
    with pytest.raises(NotFound, match="no step 8 in .*: there are 7, 12"):
        read_checkpoint(exported, step=8)


@pytest.mark.parametrize("config", [CLASSIC, MODELS["modern"]])
def test_a_huggingface_directory_comes_back_identical(config, tmp_path):
    params = random_params(config)
    write_hf(tmp_path, config, params, VOCABULARY)
    imported = read_hf(tmp_path)
    assert imported.config == config
    assert_same(imported.params, params)
    assert imported.tokenizer.fingerprint() == VOCABULARY.fingerprint()


@pytest.mark.parametrize("arch", MODELS)
def test_a_weight_without_a_foreign_name_is_refused_and_not_dropped(arch, tmp_path, monkeypatch):
    declare_blocks = weights.Blocks.__init__

    def with_gate(self, config, declare):
        declare_blocks(self, config, declare)
        shape, axes = (config.n_layer, 4), (weights.LAYERS, None)
        self.gate = declare(shape, axes, weights._constant(0.0), weights.MATRICES)

    monkeypatch.setattr(weights.Blocks, "__init__", with_gate)
    config = dataclasses.replace(MODELS[arch], sequence_len=63)  # declarations are cached by config
    params = random_params(config)
    assert "gate" in params["blocks"]
    for export, options in ((write_hf, {}), (write_checkpoint, {"step": 1, "meta": {}})):
        with pytest.raises(UsageError, match="weights that the other program lacks: gate;"):
            export(tmp_path, config, params, VOCABULARY, **options)
    assert not list(tmp_path.iterdir())


def test_embeddings_are_bfloat16_where_that_loses_nothing(model, tmp_path):
    config, params = model
    for name in ("wte", "value_embeds"):
        params[name] = params[name].astype(ml_dtypes.bfloat16).astype(np.float32)
    write_checkpoint(tmp_path, config, params, VOCABULARY, step=1, meta={})
    tensors = read_pt(tmp_path / "model_000001.pt")
    half = {name for name, tensor in tensors.items() if tensor.dtype == ml_dtypes.bfloat16}
    assert half == {"transformer.wte.weight", "value_embeds.0.weight", "value_embeds.2.weight"}
    assert_same(read_checkpoint(tmp_path).params, params)


@pytest.mark.parametrize("rule", ["raw", "decoded"])
def test_the_rule_that_counted_a_tokens_bytes_is_recognized_and_kept(exported, tmp_path, rule):
    write_pt(exported / "token_bytes.pt", VOCABULARY.token_bytes(rule))
    imported = read_checkpoint(exported)
    assert imported.byte_rule == rule
    model = (imported.config, imported.params, imported.tokenizer)
    write_checkpoint(tmp_path, *model, step=1, meta={}, byte_rule=imported.byte_rule)
    assert_same(read_pt(tmp_path / "token_bytes.pt"), VOCABULARY.token_bytes(rule))


def test_the_pickled_tokenizer_is_a_tiktoken_encoding_that_gives_our_ids(exported):
    encoding = pickle.loads((exported / "tokenizer.pkl").read_bytes())
    assert encoding.n_vocab == VOCABULARY.vocab_size
    text = "then the\u4e2d thing"
    assert encoding.encode_ordinary(text) == VOCABULARY.encode(text)
    assert encoding.encode_single_token("<|bos|>") == VOCABULARY.bos_id


def test_compiled_models_prefix_is_stripped(exported, model):
    path = exported / "model_000007.pt"
    write_pt(path, {f"_orig_mod.{name}": tensor for name, tensor in read_pt(path).items()})
    assert_same(read_checkpoint(exported, step=7).params, model[1])


class Evil:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def evil_pt(path):
    with zipfile.ZipFile(path, "w") as archive:
        content = pickle.dumps({"transformer.wte.weight": Evil()}, protocol=2)
        archive.writestr("model_000012/data.pkl", content)
        archive.writestr("model_000012/version", "3\n")


def tensors(**changes):
    """A fault: replaced tensors; None removes one. "__" stands for "."."""

    def damage(path):
        content = read_pt(path)
        for name, change in changes.items():
            name = name.replace("__", ".")
            content[name] = np.ascontiguousarray(change(content.get(name))) if change else None
        write_pt(path, {name: tensor for name, tensor in content.items() if tensor is not None})

    return damage


def model_config(**fields):
    def damage(path):
        meta = json.loads(path.read_text())
        meta["model_config"] |= fields
        path.write_text(json.dumps(meta))

    return damage


def truncated(keep):
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_vocabulary(path):
    path.write_bytes(path.read_bytes().replace(b"\x94M\x02\x01", b"\x94M\x09\x01"))


MODEL, META, WORDS, COUNTS = (
    "model_000012.pt",
    "meta_000012.json",
    "tokenizer.pkl",
    "token_bytes.pt",
)
ZEROS = lambda *shape, dtype=np.float32: np.zeros(shape, dtype)
FAULTS = {  # the file, what is done to it, and what the message must name
    "code in the pickle": (MODEL, evil_pt, r"model_000012\.pt.*refused to load \w+\.exec"),
    "torn archive": (MODEL, truncated(0.7), r"model_000012\.pt cannot be read"),
    "compressed archive": (
        MODEL,
        lambda path: rewrite(path, lambda _, content: content, zipfile.ZIP_DEFLATED),
        r"data\.pkl is compressed",
    ),
    "empty file": (MODEL, truncated(0.0), r"model_000012\.pt cannot be read"),
    "flipped bit": (MODEL, flip_byte, r"model_000012\.pt cannot be read.*CRC"),
    "unknown storage": (
        MODEL,
        lambda path: change_pickle(path, b"FloatStorage", b"EvilStorage"),
        r"refused to load torch\.EvilStorage",
    ),
    "not a state dict": (MODEL, lambda path: write_pt(path, ZEROS(3)), r"not a state dict"),
    "missing tensor": (MODEL, tensors(lm_head__weight=None), r"lacks tensors lm_head\.weight"),
    "extra tensor": (MODEL, tensors(extra=lambda _: ZEROS(1)), r"unexpected tensors extra"),
    "wrong shape": (
        MODEL,
        tensors(transformer__h__1__attn__c_k__weight=lambda x: x.T),
        r"transformer\.h\.1\.attn\.c_k\.weight has shape \(32, 16\).*\(16, 32\)",
    ),
    "integers": (
        MODEL,
        tensors(lm_head__weight=lambda x: x.astype(np.int32)),
        r"lm_head\.weight has dtype int32",
    ),
    "other heads": (META, model_config(n_head=3), r"meta_000012\.json.*n_head 3"),
    "no number": (
        META,
        model_config(n_layer="3"),
        r"meta_000012\.json: n_layer must be an integer, got '3'",
    ),
    "unknown field": (META, model_config(n_expert=8), r"n_expert"),
    "no metadata": (META, lambda path: path.unlink(), r"meta_000012\.json does not exist"),
    "torn metadata": (META, truncated(0.5), r"meta_000012\.json holds no model_config"),
    "code in the tokenizer": (
        WORDS,
        lambda path: path.write_bytes(pickle.dumps(Evil())),
        r"tokenizer\.pkl.*refused to load \w+\.exec",
    ),
    "torn tokenizer": (WORDS, truncated(0.5), r"tokenizer\.pkl cannot be read"),
    "other tokenizer": (WORDS, other_vocabulary, r"tokenizer\.pkl.*each once"),
    "counts of another tokenizer": (
        COUNTS,
        lambda path: write_pt(path, ZEROS(9, dtype=np.int32)),
        r"token_bytes\.pt does not belong",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_are_refused_by_name_and_nothing_is_written(
    fault, exported, base, tmp_path, monkeypatch
):
    name, damage, message = FAULTS[fault]
    damage(exported / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        import_weights.main(import_weights.ImportConfig(from_dir=str(exported)))
    assert not (tmp_path / "executed").exists()
    assert not (base / "base_checkpoints").exists() and not (base / "tokenizer").exists()


def test_tensors_that_reach_outside_of_their_storage_are_refused(tmp_path):
    """Believed, such strides would read the process's memory."""
    path, shape = tmp_path / "x.pt", b"(J\x02\x00\x00\x00J%c\x00\x00\x00t"
    write_pt(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    change_pickle(path, shape % 3, shape % 4)
    with pytest.raises(UsageError, match="reaches past the 6 elements"):
        read_pt(path)


def test_a_vocabulary_of_another_size_than_the_model_is_refused(exported, tmp_path):
    other = tmp_path / "tokenizer"
    Tokenizer({bytes([i]): i for i in range(256)}).save(other)
    with pytest.raises(UsageError, match="a vocabulary of 268, its tokenizer one of 265"):
        read_checkpoint(exported, tokenizer=other)


def test_what_the_target_cannot_represent_is_not_exported(model, tmp_path):
    config, params = model
    odd = dataclasses.replace(config, qk_scale=1.0)
    windowed = dataclasses.replace(CLASSIC, window_pattern="L")
    for refuse in (
        lambda: write_hf(tmp_path, odd, params, VOCABULARY),
        lambda: upstream_shape(odd),
        lambda: write_hf(tmp_path, windowed, {}, VOCABULARY),
    ):
        with pytest.raises(UsageError, match="qk_scale=1.0|window_pattern='L'"):
            refuse()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hf_directory(tmp_path):
    write_hf(tmp_path, CLASSIC, random_params(CLASSIC), VOCABULARY)
    return tmp_path


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("hidden_act", "gelu", "gelu"),
        ("model_type", "llama", "llama"),
        ("intermediate_size", 64, "64"),
        ("rms_norm_eps", 0.001, "0.001"),
        ("rope_parameters", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, "scales"),
    ],
)
def test_other_huggingface_models_are_refused(hf_directory, field, value, message):
    path = hf_directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UsageError, match=f"config.json.*{message}"):
        read_hf(hf_directory)


def test_a_huggingface_directory_without_a_tensor_is_refused(hf_directory):
    content = load_file(hf_directory / "model.safetensors")
    content.pop("model.layers.1.mlp.fc1.weight")
    save_file(content, hf_directory / "model.safetensors")
    with pytest.raises(UsageError, match="lacks tensors model.layers.1.mlp.fc1.weight"):
        read_hf(hf_directory)


def test_a_real_nanochat_tokenizer_is_read_and_written(test_data, tmp_path):
    path = test_data / "data" / "nanochat_tokenizer" / "tokenizer.pkl"
    encoding = read_encoding(path)
    assert list(encoding.special_tokens) == list(SPECIAL_TOKENS)
    assert len(encoding.mergeable_ranks) == 65527
    shutil.copy(path, tmp_path)
    lines = (path.parent / "encode_examples.jsonl").read_text().splitlines()
    tokenizer = read_tokenizer(tmp_path)
    assert lines
    for example in map(json.loads, lines):
        assert tokenizer.encode(example["text"]) == example["ids"]

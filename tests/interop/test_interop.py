"""Weights in and out without torch: nanochat's files, Hugging Face's files, and every way they can
be wrong.
"""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nanochat_jax
from nanochat_jax.checkpoint import lock_tag
from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.interop.hf import read_hf, write_hf
from nanochat_jax.interop.torch_checkpoint import (
    read_checkpoint,
    read_tokenizer,
    upstream_shape,
    write_checkpoint,
)
from nanochat_jax.interop.torch_file import read_encoding, read_pt, write_pt
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import abstract_params, init_params
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import export_weights, import_weights

VOCABULARY = Tokenizer(
    {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b"\xe4\xb8": 258}
)
SHAPE = dict(n_embd=32, n_head=4, n_kv_head=2, vocab_size=VOCABULARY.vocab_size, sequence_len=64)
MODELS = {
    "classic": GPTConfig.classic(3, **SHAPE, rotary_dtype="bfloat16"),
    "modern": GPTConfig.modern(3, **SHAPE),
}


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(config)
    )


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param], random_params(MODELS[request.param])


@pytest.fixture
def exported(model, tmp_path):
    """A directory as upstream would have written it, at steps 7 and 12."""
    config, params = model
    directory = tmp_path / "upstream"
    directory.mkdir()
    for step in (7, 12):
        write_checkpoint(
            directory,
            config,
            params,
            VOCABULARY,
            step=step,
            meta={"val_bpb": 1.5, "user_config": {}},
        )
    return directory


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def change_pickle(path, old, new):
    """Rewrite the pickle inside a .pt file."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in content if name.endswith("data.pkl"))
    assert old in content[name]
    content[name] = content[name].replace(old, new)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def test_an_exported_checkpoint_comes_back_identical(model, exported):
    config, params = model
    found = read_checkpoint(exported)
    assert (found.config, found.step, found.meta["val_bpb"]) == (config, 12, 1.5)
    assert found.tokenizer.fingerprint() == VOCABULARY.fingerprint()
    assert_same(found.params, params)


def test_upstreams_metadata_have_upstreams_fields(exported, model):
    meta = json.loads((exported / "meta_000012.json").read_text())
    fields = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"}
    assert set(meta["model_config"]) == fields | (
        {"window_pattern"} if model[0].arch == "modern" else set()
    )


def test_embeddings_are_bfloat16_where_that_loses_nothing(tmp_path):
    config = MODELS["modern"]
    params = random_params(config)
    for name in ("wte", "value_embeds"):
        params[name] = params[name].astype(ml_dtypes.bfloat16).astype(np.float32)
    write_checkpoint(tmp_path, config, params, VOCABULARY, step=1, meta={})
    tensors = read_pt(tmp_path / "model_000001.pt")
    half = {name for name, tensor in tensors.items() if tensor.dtype == ml_dtypes.bfloat16}
    assert half == {"transformer.wte.weight", "value_embeds.0.weight", "value_embeds.2.weight"}
    assert_same(read_checkpoint(tmp_path).params, params)


def test_a_huggingface_directory_comes_back_identical(model, tmp_path):
    config, params = model
    config = dataclasses.replace(config, rotary_dtype="float32")
    write_hf(tmp_path, config, params, VOCABULARY)
    found = read_hf(tmp_path)
    assert found.config == config
    assert_same(found.params, params)
    assert found.tokenizer.fingerprint() == VOCABULARY.fingerprint()


@pytest.mark.parametrize("count_rule", ["raw", "decoded"])
def test_the_rule_that_counted_a_tokens_bytes_is_recognised_and_kept(
    exported, tmp_path, count_rule
):
    write_pt(exported / "token_bytes.pt", VOCABULARY.token_bytes(count_rule))
    found = read_checkpoint(exported)
    assert found.byte_rule == count_rule
    write_checkpoint(
        tmp_path,
        found.config,
        found.params,
        found.tokenizer,
        step=1,
        meta={},
        byte_rule=found.byte_rule,
    )
    assert_same(read_pt(tmp_path / "token_bytes.pt"), VOCABULARY.token_bytes(count_rule))


def test_the_pickled_tokenizer_is_a_tiktoken_encoding_that_gives_our_ids(exported):
    """As upstream loads it; only a test may unpickle, and only what it wrote itself."""
    encoding = pickle.loads((exported / "tokenizer.pkl").read_bytes())
    assert encoding.n_vocab == VOCABULARY.vocab_size
    assert encoding.encode_ordinary("then the\u4e2d thing") == VOCABULARY.encode(
        "then the\u4e2d thing"
    )
    assert encoding.encode_single_token("<|bos|>") == VOCABULARY.bos_id


def test_compiled_models_prefix_is_stripped(exported, model):
    tensors = read_pt(exported / "model_000007.pt")
    write_pt(
        exported / "model_000007.pt",
        {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
    )
    assert_same(read_checkpoint(exported, step=7).params, model[1])


class Evil:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def evil_pt(directory):
    path = directory / "model_000012.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "model_000012/data.pkl", pickle.dumps({"transformer.wte.weight": Evil()}, protocol=2)
        )
        archive.writestr("model_000012/version", "3\n")


def rename_tensor(directory, old, new):
    path = directory / "model_000012.pt"
    write_pt(path, {name if name != old else new: tensor for name, tensor in read_pt(path).items()})


def change_tensor(directory, name, change):
    path = directory / "model_000012.pt"
    tensors = read_pt(path)
    write_pt(path, tensors | {name: np.ascontiguousarray(change(tensors[name]))})


def change_meta(directory, **fields):
    path = directory / "meta_000012.json"
    meta = json.loads(path.read_text())
    meta["model_config"] |= fields
    path.write_text(json.dumps(meta))


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def compress(path):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


FAULTS = {  # what is done to the directory, and what the message must name
    "code in the pickle": (evil_pt, r"model_000012\.pt.*refused to load \w+\.exec"),
    "torn archive": (
        lambda d: truncate(d / "model_000012.pt", 0.7),
        r"model_000012\.pt cannot be read",
    ),
    "compressed archive": (lambda d: compress(d / "model_000012.pt"), r"data\.pkl is compressed"),
    "empty file": (
        lambda d: truncate(d / "model_000012.pt", 0.0),
        r"model_000012\.pt cannot be read",
    ),
    "flipped bit": (
        lambda d: flip_byte(d / "model_000012.pt"),
        r"model_000012\.pt cannot be read.*CRC",
    ),
    "unknown storage": (
        lambda d: change_pickle(d / "model_000012.pt", b"FloatStorage", b"EvilStorage"),
        r"refused to load torch\.EvilStorage",
    ),
    "not a state dict": (
        lambda d: write_pt(d / "model_000012.pt", np.zeros(3, np.float32)),
        r"not a state dict",
    ),
    "missing tensor": (
        lambda d: rename_tensor(d, "lm_head.weight", "head.weight"),
        r"lacks tensors lm_head\.weight",
    ),
    "extra tensor": (
        lambda d: (
            change_tensor(d, "lm_head.weight", lambda x: x)
            or write_pt(
                d / "model_000012.pt",
                {**read_pt(d / "model_000012.pt"), "extra": np.zeros(1, np.float32)},
            )
        ),
        r"unexpected tensors extra",
    ),
    "wrong shape": (
        lambda d: change_tensor(d, "transformer.h.1.attn.c_k.weight", lambda x: x.T),
        r"transformer\.h\.1\.attn\.c_k\.weight has shape \(32, 16\).*\(16, 32\)",
    ),
    "integers": (
        lambda d: change_tensor(d, "lm_head.weight", lambda x: x.astype(np.int32)),
        r"lm_head\.weight has dtype int32",
    ),
    "other heads": (lambda d: change_meta(d, n_head=3), r"meta_000012\.json.*n_head 3"),
    "no number": (
        lambda d: change_meta(d, n_layer="3"),
        r"meta_000012\.json: n_layer must be an integer, got '3'",
    ),
    "unknown field": (lambda d: change_meta(d, n_expert=8), r"n_expert"),
    "no metadata": (
        lambda d: (d / "meta_000012.json").unlink(),
        r"meta_000012\.json does not exist",
    ),
    "torn metadata": (
        lambda d: truncate(d / "meta_000012.json", 0.5),
        r"meta_000012\.json holds no model_config",
    ),
    "code in the tokenizer": (
        lambda d: (d / "tokenizer.pkl").write_bytes(pickle.dumps(Evil())),
        r"tokenizer\.pkl.*refused to load \w+\.exec",
    ),
    "torn tokenizer": (
        lambda d: truncate(d / "tokenizer.pkl", 0.5),
        r"tokenizer\.pkl cannot be read",
    ),
    "other tokenizer": (
        lambda d: (d / "tokenizer.pkl").write_bytes(
            (d / "tokenizer.pkl").read_bytes().replace(b"\x94M\x02\x01", b"\x94M\x09\x01")
        ),
        r"tokenizer\.pkl.*each once",
    ),
    "counts of another tokenizer": (
        lambda d: write_pt(d / "token_bytes.pt", np.arange(9, dtype=np.int32)),
        r"token_bytes\.pt does not belong",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_are_refused_by_name_and_nothing_is_written(
    fault, exported, tmp_path, monkeypatch
):
    damage, message = FAULTS[fault]
    damage(exported)
    base = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        import_weights.main(import_weights.ImportConfig(from_dir=str(exported)))
    assert not (tmp_path / "executed").exists()
    assert not (base / "base_checkpoints").exists() and not (base / "tokenizer").exists()


def test_tensors_that_reach_outside_of_their_storage_are_refused(tmp_path):
    """Strides and offsets come from the file; believed, they would read the process's memory."""
    path = tmp_path / "x.pt"
    write_pt(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    change_pickle(
        path, b"(J\x02\x00\x00\x00J\x03\x00\x00\x00t", b"(J\x02\x00\x00\x00J\x04\x00\x00\x00t"
    )
    with pytest.raises(UsageError, match="reaches past the 6 elements"):
        read_pt(path)


def test_a_vocabulary_of_another_size_than_the_model_is_refused(exported, tmp_path):
    other = tmp_path / "tokenizer"
    Tokenizer({bytes([i]): i for i in range(256)}).save(other)
    with pytest.raises(UsageError, match="a vocabulary of 268, its tokenizer one of 265"):
        read_checkpoint(exported, tokenizer=other)


def test_what_the_target_cannot_represent_is_not_exported(tmp_path):
    """transformers would load it, warn, and compute something else."""
    params = init_params(MODELS["modern"], jax.random.key(0))
    odd = dataclasses.replace(MODELS["modern"], qk_scale=1.0)
    for refuse in (
        lambda: write_hf(tmp_path, odd, params, VOCABULARY),
        lambda: upstream_shape(odd),
        lambda: write_hf(
            tmp_path, dataclasses.replace(MODELS["classic"], window_pattern="L"), {}, VOCABULARY
        ),
    ):
        with pytest.raises(UsageError, match="qk_scale|window_pattern"):
            refuse()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_act", "gelu"),
        ("model_type", "llama"),
        ("intermediate_size", 64),
        ("rms_norm_eps", 0.001),
        ("rope_parameters", {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    ],
)
def test_other_huggingface_models_are_refused(tmp_path, field, value):
    config = dataclasses.replace(MODELS["classic"], rotary_dtype="float32")
    write_hf(tmp_path, config, random_params(config), VOCABULARY)
    shape = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(
        UsageError, match="config.json.*" + ("scales" if field == "rope_parameters" else str(value))
    ):
        read_hf(tmp_path)


def test_a_huggingface_directory_without_a_tensor_is_refused(tmp_path):
    config = dataclasses.replace(MODELS["classic"], rotary_dtype="float32")
    write_hf(tmp_path, config, random_params(config), VOCABULARY)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.fc1.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="lacks tensors model.layers.1.mlp.fc1.weight"):
        read_hf(tmp_path)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def import_from(directory, **options):
    import_weights.main(import_weights.ImportConfig(from_dir=str(directory), **options))


@pytest.mark.parametrize("format", ["nanochat", "hf"])
def test_import_export_import_by_the_scripts(format, model, exported, base, tmp_path):
    config, params = model
    import_from(exported, source="sft", model_tag="mine", step=7)
    loaded = nanochat_jax.load("sft")
    assert (loaded.config, loaded.step) == (config, 7)
    assert_same(loaded.params, params)
    out = tmp_path / "out"
    export_weights.main(
        export_weights.ExportConfig(source="sft", model_tag="mine", format=format, out=str(out))
    )
    # who reads one file, reads all
    assert len({path.stat().st_mode for path in out.iterdir() if path.is_file()}) == 1
    import_from(out, source="rl", rotary_dtype=config.rotary_dtype)
    again = nanochat_jax.load("rl", tag="d3")
    assert again.config == config
    assert_same(again.params, params)
    assert_same(nanochat_jax.load(out).params, params)
    assert_same(nanochat_jax.load(base / "chatrl_checkpoints" / "d3").params, params)
    with pytest.raises(UsageError, match="already holds steps"):
        import_from(out, source="rl")
    with pytest.raises(UsageError, match="not an empty directory"):
        export_weights.main(export_weights.ExportConfig(source="rl", format=format, out=str(out)))


def test_nothing_is_imported_into_a_tag_in_use_which_can_be_read(exported, base):
    import_from(exported, model_tag="mine")
    directory = base / "base_checkpoints" / "mine"
    before = set(directory.rglob("*"))
    with lock_tag(directory):
        for fresh in (False, True):
            with pytest.raises(UsageError, match=f"{directory} is in use by process"):
                import_from(exported, model_tag="mine", fresh=fresh)
        assert set(directory.rglob("*")) == before
        assert nanochat_jax.load("base", tag="mine").step == 12


def test_a_model_keeps_its_own_tokenizer_beside_another(exported, base):
    other = Tokenizer({bytes([i]): i for i in range(256)} | {b"on": 256, b"no": 257, b"nn": 258})
    other.save(base / "tokenizer")
    import_from(exported, model_tag="mine")
    loaded = nanochat_jax.load("base", tag="mine")
    assert loaded.tokenizer.fingerprint() == VOCABULARY.fingerprint()
    assert Tokenizer.load(base / "tokenizer").fingerprint() == other.fingerprint()


def test_weights_without_a_tokenizer_take_ids_only(exported, base):
    for path in exported.glob("token*"):
        path.unlink()
    import_from(exported)
    for model in (nanochat_jax.load("base"), nanochat_jax.load(exported)):
        assert model.tokenizer is None
        assert len(model.generate([1, 2, 3], max_tokens=5)) == 5
        with pytest.raises(UsageError, match="without a tokenizer"):
            model.generate("text")
    with pytest.raises(UsageError, match="without a tokenizer"):
        export_weights.main(export_weights.ExportConfig(source="base", out=str(base / "out")))


def test_fresh_deletes_nothing_before_all_that_can_be_refused_has_been(exported, base):
    import_from(exported, model_tag="mine")
    for path in exported.glob("token*"):
        path.unlink()
    Tokenizer({bytes([i]): i for i in range(256)}).save(base / "tokenizer")
    with pytest.raises(UsageError, match="do not belong together"):
        import_from(exported, model_tag="mine", fresh=True)
    inside = base / "base_checkpoints" / "mine" / "pytorch"
    shutil.copytree(exported, inside)
    with pytest.raises(UsageError, match="is inside the directory to write"):
        import_from(inside, model_tag="mine", fresh=True)
    assert (base / "base_checkpoints" / "mine" / "12").is_dir() and (
        inside / "model_000012.pt"
    ).exists()


def test_the_greatest_step_is_taken_and_others_by_name(exported, base):
    assert read_checkpoint(exported).step == 12
    assert read_checkpoint(exported, step=7).step == 7
    with pytest.raises(NotFound, match="no step 8 in .*: there are 7, 12"):
        read_checkpoint(exported, step=8)
    with pytest.raises(NotFound, match="no model_<step>.pt"):
        import_from(base.parent)


def test_a_model_in_three_lines(exported, model):
    config, params = model
    loaded = nanochat_jax.load(exported)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 37))
    logits = loaded.logits(tokens)
    assert (logits.dtype, logits.shape) == (np.float32, (2, 37, config.vocab_size))
    np.testing.assert_allclose(loaded.logits(tokens[:1, :20]), logits[:1, :20], atol=1e-4)
    ids = loaded.generate(tokens[0], max_tokens=8, temperature=0.0)
    whole = [*tokens[0], *ids]
    assert loaded.logits([whole])[0, 36:-1].argmax(-1).tolist() == ids
    assert loaded.generate(tokens[0], max_tokens=8, seed=5) == loaded.generate(
        tokens[0], max_tokens=8, seed=5
    )
    text = loaded.generate("the cat", max_tokens=8, temperature=0.0)
    prompt = VOCABULARY.encode("the cat", prepend="<|bos|>")
    assert isinstance(text, str) and VOCABULARY.decode(
        loaded.generate(prompt, max_tokens=8, temperature=0.0)
    ).startswith(text)


@pytest.mark.parametrize("tokens", [[1, 2, 3], [[0.5]], [[]], [[9999]], [[-1]]])
def test_bad_tokens_are_refused_with_the_value(exported, tokens):
    with pytest.raises(ValueError, match="tokens must be integers|ids must be in"):
        nanochat_jax.load(exported).logits(tokens)


def test_importing_the_package_does_not_import_jax():
    code = "import sys, nanochat_jax; assert 'jax' not in sys.modules; nanochat_jax.load; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_real_nanochat_tokenizer_is_read_and_written(test_data, tmp_path):
    path = test_data / "data" / "nanochat_tokenizer" / "tokenizer.pkl"
    encoding = read_encoding(path)
    assert (
        list(encoding.special_tokens) == list(SPECIAL_TOKENS)
        and len(encoding.mergeable_ranks) == 65527
    )
    shutil.copy(path, tmp_path)
    examples = [
        json.loads(line)
        for line in (path.parent / "encode_examples.jsonl").read_text().splitlines()
    ]
    tokenizer = read_tokenizer(tmp_path)
    assert examples
    for example in examples:
        assert tokenizer.encode(example["text"]) == example["ids"]

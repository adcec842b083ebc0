"""The scripts that import and export weights."""

import ast
import shutil

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from interop_models import MODELS, VOCABULARY, assert_same

import nanochat_jax
from nanochat_jax.checkpoint import lock_tag
from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.report.sections import log_section
from nanochat_jax.tokenizer import Tokenizer
from scripts import export_weights, import_weights


def import_from(directory, **options):
    import_weights.main(import_weights.ImportConfig(from_dir=str(directory), **options))


def export_to(directory, **options):
    export_weights.main(export_weights.ExportConfig(out=str(directory), **options))


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("format", ["nanochat", "hf"])
def test_import_export_import_by_the_scripts(format, model, exported, base, tmp_path):
    config, params = model
    import_from(exported, source="sft", model_tag="mine", step=7)
    loaded = nanochat_jax.load("sft")
    assert (loaded.config, loaded.step) == (config, 7)
    assert_same(loaded.params, params)
    out = tmp_path / "out"
    export_to(out, source="sft", model_tag="mine", format=format)
    # whoever can read one file can read all
    assert len({path.stat().st_mode for path in out.iterdir() if path.is_file()}) == 1
    import_from(out, source="rl", rotary_dtype=config.rotary_dtype)
    again = nanochat_jax.load("rl", tag="d3")
    assert again.config == config
    for loaded in (
        again,
        nanochat_jax.load(out),
        nanochat_jax.load(base / "chatrl_checkpoints/d3"),
    ):
        assert_same(loaded.params, params)
    with pytest.raises(UsageError, match="already holds steps"):
        import_from(out, source="rl")
    with pytest.raises(UsageError, match="not an empty directory"):
        export_to(out, source="rl", format=format)


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
    with pytest.raises(NotFound, match="no model_<step>.pt"):
        import_from(base.parent)


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
        with pytest.raises(UsageError, match="have no tokenizer"):
            model.generate("text")
    assert len(model.generate([1, 2, 3], max_tokens=5)) == 5
    with pytest.raises(UsageError, match="without a tokenizer"):
        export_to(base / "out", source="base")


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
    assert (base / "base_checkpoints" / "mine" / "12").is_dir()
    assert (inside / "model_000012.pt").exists()


@pytest.fixture
def hub(base, tmp_path, monkeypatch):
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path)
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # uploads over plain HTTP
        yield server


def write_files(files, directory):
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.mark.parametrize("arch", MODELS)
def test_a_pushed_model_has_a_card_and_loads_again(model, exported, base, hub, tmp_path):
    config, params = model
    import_from(exported, source="sft", model_tag="mine")
    report = base / "report"
    report.mkdir()
    for stage, name, results in (
        ("chat_eval_sft", "mine, step 12", {"arc_easy": 0.375, "chatcore_5": 0.125}),
        ("chat_eval_mid", "mine, step 12", {"mmlu": 0.5}),
        ("base_loss", "other, step 12", {"val_bpb": 0.9}),
    ):
        log_section(report, stage, [], stage=stage, results=results, model=name)
    push = export_weights.ExportConfig(source="sft", push="me/my-model", private=True)
    for _ in range(2):  # the second one replaces the files
        export_weights.main(push)
    assert [wanted["visibility"] for wanted in hub.created] == ["private"] * 2
    files = hub.models["me/my-model"]
    loaded = nanochat_jax.load(write_files(files, tmp_path / "downloaded"))
    assert loaded.config.arch == config.arch
    assert_same(loaded.params, params)
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# my-model\n" in card
    assert "| ARC-Easy | 37.5% |\n| ChatCORE (5) | 12.5% |\n" in card
    assert "MMLU" not in card and "bpb" not in card and "stage sft, step 12" in card
    example = card.split("```")[1].removeprefix("python\n")
    assert len(ast.parse(example).body) == 3 and "me/my-model" in example
    assert ("trust_remote_code=True" in example) == (config.arch == "modern")
    assert ("vLLM cannot run" in card) == (config.arch == "modern")


def test_a_refused_push_is_one_line_before_the_export(exported, base, hub, monkeypatch):
    import_from(exported, source="sft")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UsageError, match="cannot create me/x on the Hub: .*hf auth login") as error:
        export_weights.main(export_weights.ExportConfig(source="sft", push="me/x"))
    assert "\n" not in str(error.value) and not hub.asked("preupload")
    for wrong in (
        {"push": "only-a-name"},
        {"push": "../x/y"},
        {"push": "me/x", "format": "nanochat"},
        {"out": "x", "private": True},
    ):
        with pytest.raises(ValueError, match="--p"):
            export_weights.ExportConfig(**wrong)

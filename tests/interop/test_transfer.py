"""The scripts that import and export weights."""

import shutil

import pytest
from interop_models import MODELS, VOCABULARY, assert_same

import nanochat_jax
from nanochat_jax.checkpoint import lock_tag
from nanochat_jax.errors import NotFound, UsageError
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

"""One run per tag: a second one is refused before it reads, trains or deletes anything."""

from pathlib import Path

import pytest
from small_line import make_base

from nanochat_jax.checkpoint import find_model, lock_tag
from nanochat_jax.errors import UsageError
from nanochat_jax.files import LOCK, lock_file
from nanochat_jax.paths import Paths, base_tokenizer
from nanochat_jax.speedrun import runner as speedrun
from nanochat_jax.train.pretrain import BaseTrainConfig, pretrain
from nanochat_jax.train.rl import ChatRLConfig, reinforce
from nanochat_jax.train.stages import ChatSFTConfig, MidTrainConfig, midtrain, supervised_finetune

TAG = dict(model_tag="d2", mesh="1x1", num_iterations=1)
STARTS = {
    "base": lambda **more: pretrain(BaseTrainConfig(depth=2, data="embedded", **TAG, **more)),
    "mid": lambda **more: midtrain(MidTrainConfig(**TAG, **more)),
    "sft": lambda **more: supervised_finetune(ChatSFTConfig(**TAG, **more)),
    "rl": lambda **more: reinforce(ChatRLConfig(**TAG, **more)),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A base directory in which every stage has a step, as far as names tell."""
    paths = make_base(tmp_path_factory.mktemp("base"))
    for source in STARTS:
        (paths.checkpoints(source) / "d2" / "3" / "params").mkdir(parents=True)
    return paths


def below(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


@pytest.mark.parametrize(
    "flags", [{}, {"resume": True}, {"fresh": True}], ids=["new", "resume", "fresh"]
)
@pytest.mark.parametrize("source", STARTS)
def test_a_stage_whose_tag_is_in_use_is_refused_and_changes_nothing(
    paths, monkeypatch, source, flags
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(paths.base))
    directory = paths.checkpoints(source) / "d2"
    with lock_file(directory / LOCK, "d2", ""):
        before = below(directory)
        with pytest.raises(
            UsageError, match=rf"^{directory} is in use by process \d+ on .*: wait for it"
        ) as refused:
            STARTS[source](**flags)
        assert "\n" not in str(refused.value) and below(directory) == before
        assert find_model(paths, source, "d2") == directory  # reading needs no lock
    with lock_tag(directory), lock_tag(paths.checkpoints(source) / "other"):
        pass


@pytest.mark.parametrize("delete", [True, False])
def test_a_speedrun_clears_no_tag_that_is_in_use(tmp_path, delete):
    directory = tmp_path / "d4"
    (directory / "100").mkdir(parents=True)
    with lock_tag(directory), pytest.raises(UsageError, match=f"{directory} is in use"):
        speedrun.clear_tag(directory, delete=delete)
    assert (directory / "100").is_dir()
    (directory / "model_000100.pt").touch()
    with pytest.raises(UsageError, match="holds checkpoints of nanochat's PyTorch code"):
        speedrun.clear_tag(directory, delete=delete)
    assert (directory / "100").is_dir()


@pytest.mark.parametrize(
    "linked", ["", "base", "base/base_checkpoints", "base/base_checkpoints/d2"]
)
def test_the_tokenizer_of_a_tag_is_found_wherever_its_directory_is_linked_to(tmp_path, linked):
    for path in (Path("base"), Path("base/base_checkpoints"), Path("base/base_checkpoints/d2")):
        if str(path) == linked:
            (tmp_path / "disk" / path.name).mkdir(parents=True)
            (tmp_path / path).symlink_to(tmp_path / "disk" / path.name)
        else:
            (tmp_path / path).mkdir()
    paths = Paths(tmp_path / "base")
    paths.tokenizer.mkdir()
    tag = paths.checkpoints("base") / "d2"
    assert base_tokenizer(tag) == paths.tokenizer
    shortcut = tmp_path / "shortcut"  # to a tag, from elsewhere
    shortcut.symlink_to(tag)
    if linked in ("", "base"):
        assert base_tokenizer(shortcut).samefile(paths.tokenizer)

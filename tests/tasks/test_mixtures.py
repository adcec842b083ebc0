"""Training mixtures: upstream's, and those that a user names."""

import json
from collections import Counter

import pytest
from task_helpers import write_lines

from nanochat_jax import tasks
from nanochat_jax.errors import UsageError
from nanochat_jax.paths import Paths
from nanochat_jax.tasks import mixtures
from nanochat_jax.tasks.base import user

AB = [user("a"), {"role": "assistant", "content": "b"}]


def test_a_named_mixture(tmp_path, paths):
    chat = json.dumps([user("hi"), {"role": "assistant", "content": "there"}])
    (tmp_path / "chats.jsonl").write_text(f"{chat}\n" * 10)
    mixture = tasks.mixture_for(
        "climbmix", "sft", "train", paths, named=f"GSM8K, ARC-Easy*3,{tmp_path}/chats.jsonl*0.5"
    )
    assert len(mixture) == 7473 + 3 * 2251 + 5
    few = tasks.mixture_for("climbmix", "sft", "train", paths, named="GSM8K:20,ARC-Easy")
    assert len(few) == 20 + 2251 and Counter(few.order)[0, 19] == 1 and (0, 20) not in few.order
    # validation stays what it was
    assert len(tasks.mixture_for("climbmix", "sft", "val", paths, named="GSM8K")) == 220


@pytest.mark.parametrize(
    "named, message",
    [
        ("GSM9K", "unknown task 'GSM9K': expected SmolTalk, "),
        ("GSM8K*", "the weight of 'ChitChat\\*' must be"),
        ("GSM8K*0", "must be a positive"),
        ("GSM8K*nan", "must be a positive"),
        ("", "unknown task ''"),
        # before MMLU is downloaded
        ("MMLU,GSM9K", "unknown task 'GSM9K'"),
        ("MMLU,no.jsonl", "no.jsonl does not exist"),
        ("no.jsonl", "no.jsonl does not exist"),
        ("ChitChat*1e-9", "takes none of the"),
    ],
)
def test_a_mixture_that_cannot_be(tmp_path, no_network, named, message):
    with pytest.raises(UsageError, match=message):
        mixtures.named_mixture(named.replace("GSM8K*", "ChitChat*"), Paths(tmp_path))


@pytest.mark.parametrize(
    "spelling", ["{folder}/chats.jsonl", "{folder}/x/../chats.jsonl", "{folder}/link.jsonl:3"]
)
def test_a_file_given_twice_is_read_once_and_that_is_logged(tmp_path, caplog, spelling):
    path = write_lines(tmp_path / "chats.jsonl", [AB] * 5)
    (tmp_path / "x").mkdir()
    (tmp_path / "link.jsonl").symlink_to(path)
    named = f"{path}*2,{spelling.format(folder=tmp_path)}"
    assert len(mixtures.named_mixture(named, Paths(tmp_path))) == 10
    assert f"the file is {path} again and is read once" in caplog.text


@pytest.mark.parametrize(
    "stage, split, size",
    [
        ("mid", "train", 4197 + 8315 + 7473 + 2 * 1000 + 280_000),
        ("mid", "val", 220 + 5200 + 420),
        ("sft", "train", 2251 + 1119 + 7473 + 4197 + 1000 + 600),
        ("sft", "val", 220),
    ],
)
def test_upstream_mixtures(paths, stage, split, size):
    mixture = tasks.upstream_mixture(stage, split, paths)
    assert len(mixture) == size
    for i in range(0, size, max(1, size // 100)):
        roles = [message["role"] for message in mixture[i]["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)


def test_a_mixture_that_would_fill_the_memory_is_refused(tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", [AB] * 5)
    with pytest.raises(
        UsageError,
        match="takes 500,000,000 conversations, more than 20,000,000: give smaller weights",
    ):
        mixtures.named_mixture(f"{path}*1e8", Paths(tmp_path))

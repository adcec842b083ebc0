"""Conversation batches: each conversation once per epoch, masks kept, exact continuation."""

import itertools
import json
import re

import numpy as np
import pytest

from nanochat_jax.conversation import render_conversation
from nanochat_jax.data.loader import merge_states
from nanochat_jax.data.mixture import ConversationLoader
from nanochat_jax.errors import UsageError
from nanochat_jax.tokenizer import Tokenizer

T = 96
MODES = ("rows", "single", "stream")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer({bytes([byte]): byte for byte in range(256)})


def chat(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    return [
        chat("q" * int(rng.integers(1, 40)), f"{i}." + "a" * int(rng.integers(0, 80)))
        for i in range(331)
    ]


def make(task, tokenizer, mode, start_state=None, **options):
    loader = ConversationLoader(
        task, tokenizer, **{"batch_size": 8, "sequence_len": T, "mode": mode, **options}
    )
    if start_state:
        loader.set_state(start_state)
    return loader


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name in ("inputs", "targets"):
            assert batch[name].dtype == np.int32
            np.testing.assert_array_equal(batch[name], other[name])


def split_row(row, bos):
    """The pieces of a row that start with BOS, padding left out."""
    starts = [*np.flatnonzero(row == bos), len(row)]
    return [row[a:b].tolist() for a, b in itertools.pairwise(starts) if b - a > 1]


@pytest.mark.parametrize("mode", ["rows", "single"])
def test_rows_hold_each_conversation_whole_and_once(task, tokenizer, mode):
    batches = list(make(task, tokenizer, mode, num_epochs=1, batch_size=1))
    expected = [render_conversation(tokenizer, conversation) for conversation in task]
    assert (
        min(len(ids) for ids, _ in expected) < T / 3
        and max(len(ids) for ids, _ in expected) > T + 1
    )
    found = []
    for batch in batches:
        inputs, targets = batch["inputs"][0], batch["targets"][0]
        assert inputs[0] == tokenizer.bos_id
        # The row's last token is a target only; where that is not trained, it is padding.
        last = targets[-1] if targets[-1] != -1 else tokenizer.bos_id
        found += split_row(np.append(inputs, last), tokenizer.bos_id)
        supervised = targets != -1
        np.testing.assert_array_equal(targets[:-1][supervised[:-1]], inputs[1:][supervised[:-1]])
    assert sorted(found) == sorted(ids[: T + 1] for ids, _ in expected)
    if mode == "single":
        assert found == [ids[: T + 1] for ids, _ in expected]
    trained = sum(int((batch["targets"] != -1).sum()) for batch in batches)
    assert trained == sum(sum(mask[: T + 1]) for _, mask in expected)


def test_exactly_the_assistants_tokens_are_trained(tokenizer):
    parts = [
        {"type": "text", "text": "So "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
    ]
    batch = next(make([chat("How much?", parts)], tokenizer, "rows", num_epochs=1, batch_size=1))
    trained = [token for token in batch["targets"][0].tolist() if token != -1]
    special = tokenizer.encode_special
    assert trained == [
        *b"So ",
        special("<|python_start|>"),
        *b"1+1",
        special("<|python_end|>"),
        special("<|assistant_end|>"),
    ]
    length = len(render_conversation(tokenizer, chat("How much?", parts))[0])
    assert (batch["inputs"][0, length:] == tokenizer.bos_id).all() and (
        batch["targets"][0, length - 1 :] == -1
    ).all()


def test_rows_take_the_longest_conversation_that_fits(tokenizer):
    """T+1 = 40: lengths are 5 + question + answer."""
    task = [chat("q" * size, "a") for size in (20, 3, 30, 12, 8)]  # 26, 9, 36, 18, 14 tokens
    batches = list(make(task, tokenizer, "rows", num_epochs=1, batch_size=1, sequence_len=39))
    lengths = [
        [len(piece) for piece in split_row(batch["inputs"][0], tokenizer.bos_id)]
        for batch in batches
    ]
    # 26 and 14 fill the row: the last token is a target only
    assert lengths == [[36], [26, 13], [18, 9]]


def test_conversations_longer_than_a_row_are_cut_and_those_with_nothing_to_learn_skipped(
    tokenizer, caplog
):
    task = [chat("q" * 200, "answer"), chat("q" * 10, "a" * 200), chat("hello", "there")]
    loader = make(task, tokenizer, "rows", num_epochs=1, batch_size=1)
    assert loader.count_batches() == 2
    assert "training mixture: of 3 conversations, 2 were truncated and 1 skipped" in caplog.text
    batches = list(loader)
    assert [int((batch["targets"] != -1).sum()) for batch in batches] == [T + 1 - 14, 6]
    assert loader.position == {"epoch": 0, "cursor": 3}
    assert (loader.get_state()["num_cut"], loader.get_state()["num_skipped"]) == (2, 1)
    with pytest.raises(
        UsageError, match="none of the 1 conversations has a token to train on within a row of 96"
    ):
        next(make(task[:1], tokenizer, "rows"))


@pytest.mark.parametrize("mode", MODES)
def test_what_a_part_of_an_epoch_cuts_is_counted_too(tokenizer, caplog, mode):
    task = [chat("q", "a" * 3000)] * 300
    for conversation in (100, 200):
        task[conversation] = chat("hello", "there")
    loader = make(task, tokenizer, mode, batch_size=1, name="validation")
    assert loader.count_batches(at_most=1) == 1
    read, cut = map(
        int,
        re.findall(
            r"validation mixture: of the first (\d+) conversations, (\d+) were", caplog.text
        )[0],
    )
    assert 0 < cut <= read < 300 and cut >= read - 2
    caplog.clear()
    loader.count_batches(2 if mode == "stream" else 1)
    assert "validation mixture: of 300 conversations, 298 were truncated" in caplog.text


@pytest.mark.parametrize("mode", MODES)
def test_every_row_has_a_token_to_train_on(task, tokenizer, mode):
    mixed = [chat("q" * 300, "a") if i % 3 == 0 else task[i] for i in range(300)]
    for batch in make(mixed, tokenizer, mode, num_epochs=2):
        assert (batch["targets"] != -1).any(axis=1).all()


def test_stream_is_the_concatenation_of_all_conversations(task, tokenizer):
    whole = np.concatenate(
        [render_conversation(tokenizer, conversation)[0] for conversation in task] * 2
    )
    batches = list(make(task, tokenizer, "stream", num_epochs=2))
    assert len(batches) == len(whole) // (8 * T + 1)
    for step, batch in enumerate(batches):
        start = step * (8 * T + 1)
        np.testing.assert_array_equal(batch["inputs"].ravel(), whole[start : start + 8 * T])
        np.testing.assert_array_equal(
            batch["targets"].ravel(), whole[start + 1 : start + 8 * T + 1]
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_epochs", [1, 3])
def test_count_batches_is_what_the_loader_yields(task, tokenizer, mode, num_epochs):
    loader = make(task, tokenizer, mode, num_epochs=num_epochs)
    count = loader.count_batches(num_epochs)
    assert count == len(list(loader)) > 5
    assert make(task, tokenizer, mode).count_batches(num_epochs) == count


@pytest.mark.parametrize("mode", MODES)
def test_restored_state_continues_exactly_at_every_step(task, tokenizer, mode):
    loader = make(task, tokenizer, mode)
    states, batches = [], []
    for _ in range(80):
        states.append(json.dumps(loader.get_state()))
        batches.append(next(loader))
    assert loader.get_state()["epoch"] >= 1
    for step in range(0, 75, 6):
        restored = make(task, tokenizer, mode, start_state=json.loads(states[step]))
        assert restored.get_state() == json.loads(states[step])
        assert_equal(batches[step : step + 5], [next(restored) for _ in range(5)])
        assert restored.get_state() == json.loads(states[step + 5])


@pytest.mark.parametrize("mode", MODES)
def test_processes_share_out_the_same_global_batches(task, tokenizer, mode):
    alone = list(make(task, tokenizer, mode, num_epochs=1))
    loaders = [
        make(task, tokenizer, mode, num_epochs=1, process_index=i, process_count=2)
        for i in range(2)
    ]
    parts = [list(loader) for loader in loaders]
    steps = zip(*parts, strict=True)
    together = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in steps
    ]
    assert_equal(alone, together)
    states = [loader.get_state() for loader in loaders]
    assert merge_states(states) == states[0] == states[1]


def test_mistakes_are_named(task, tokenizer):
    with pytest.raises(UsageError, match="holds no conversation"):
        make([], tokenizer, "rows")
    with pytest.raises(UsageError, match="unknown mode 'packed'"):
        make(task, tokenizer, "packed")
    with pytest.raises(UsageError, match="3 processes do not divide the batch of 8 rows"):
        make(task, tokenizer, "rows", process_count=3)
    with pytest.raises(UsageError, match="with size 331, this one has 330"):
        make(task[1:], tokenizer, "rows", start_state=make(task, tokenizer, "rows").get_state())
    state = make(task, tokenizer, "rows").get_state()
    changed = [*task[:-1], chat("another", "text")]
    changed[0] = changed[-1]
    with pytest.raises(UsageError, match="the tokenizer or the texts have changed"):
        make(changed, tokenizer, "rows", start_state=state)
    with pytest.raises(UsageError, match="conversation 1 of the mixture: message 0"):
        next(
            make(
                [task[0], {"messages": [{"role": "assistant", "content": "hm"}]}], tokenizer, "rows"
            )
        )

"""The offline tasks: test items are never trained on, every tool call computes."""

import json
import random
import re
from collections import Counter
from importlib.util import find_spec

import pytest

from nanochat_jax import tasks
from nanochat_jax.infer.calculator import calculate
from nanochat_jax.paths import Paths
from nanochat_jax.tasks import chitchat
from nanochat_jax.tasks.chitchat import ChitChat
from nanochat_jax.tasks.identity import ABOUT, OPENERS, Identity
from nanochat_jax.tasks.skills import (
    Arithmetic,
    LetterCount,
    Spelling,
    WordArithmetic,
    final_number,
    split_of,
)

STEMS = "gover straw open settle win under commit peace labor nation".split()
ENDINGS = "ment berry ing ters dow stand tee ful able al ion ist ness ship".split()
WORDS = [stem + ending for stem in STEMS for ending in ENDINGS]
needs_chitchat = pytest.mark.skipif(
    find_spec("chitchat_dataset") is None,
    reason="the package chitchat-dataset (extra `offline`) is not installed",
)


def skills(split: str, size: int) -> list:
    words = (Spelling(split, size, WORDS), LetterCount(split, size, WORDS))
    return [Arithmetic(split, size), WordArithmetic(split, size), *words, Identity(split, size)]


def question(conversation) -> str:
    return conversation["messages"][-2]["content"]


def reply(conversation) -> str:
    """The reference reply as a model's text: parts joined, special tokens spelled out."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    marks = {
        "text": "{}",
        "python": "<|python_start|>{}<|python_end|>",
        "python_output": "<|output_start|>{}<|output_end|>",
    }
    return "".join(marks[part["type"]].format(part["text"]) for part in content)


def call(conversation) -> str:
    return conversation["messages"][-1]["content"][0]["text"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_item_depends_on_its_split_and_index_only(split):
    for small, large in zip(skills(split, 20), skills(split, 400), strict=True):
        backwards = [large[i] for i in reversed(range(20))][::-1]
        assert list(small) == backwards == list(small)


def test_splits_and_skills_have_streams_of_their_own():
    for train, test in zip(skills("train", 50), skills("test", 50), strict=True):
        assert not {json.dumps(c) for c in train} & {json.dumps(c) for c in test}
    numbers = [re.findall(r"\d+", call(c)) for c in Arithmetic("train", 200)]
    assert len({tuple(n) for n in numbers}) > 150


def test_no_arithmetic_problem_is_in_both_splits():
    def problems(split):
        for conversation in Arithmetic(split, 3_000):
            a, operation, b = call(conversation).split(" ")
            yield (operation, *(sorted((a, b)) if operation in "+*" else (a, b)))

    train, test = set(problems("train")), set(problems("test"))
    assert len(test) > 2_000
    assert not train & test


def test_no_word_is_in_both_splits():
    for make in (Spelling, LetterCount):
        train, test = make("train", 1, WORDS), make("test", 1, WORDS)
        assert set(train.words) | set(test.words) == set(WORDS)
        drawn = {train.draw_word(random.Random(i)) for i in range(2000)}
        # some are made up, none is a test word
        assert drawn - set(WORDS) and not drawn & set(test.words)
        assert all(split_of(word) == "train" for word in drawn)
        assert {test.draw_word(random.Random(i)) for i in range(2000)} <= set(test.words)
        assert not set(train.words) & set(test.words)
    assert 0.05 < sum(split_of(f"word{i}") == "test" for i in range(2_000)) / 2_000 < 0.15


def test_no_identity_question_is_in_both_splits():
    def asked(split):
        return {
            m["content"].lower().rstrip("?.")
            for c in Identity(split, 3_000)
            for m in c["messages"][::2]
        }

    every = {
        (o + q).lower().rstrip("?.") for o in OPENERS for topic in ABOUT for q in topic["questions"]
    }
    train, test = asked("train"), asked("test")
    assert test <= every
    assert len(test) > 20
    assert not train & test


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_reference_is_right_and_its_tool_call_computes_its_output(split):
    for task in skills(split, 300):
        for conversation in task:
            roles = [message["role"] for message in conversation["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            if split == "test" or task.key != "identity":
                assert task.evaluate(conversation, reply(conversation))
            content = conversation["messages"][-1]["content"]
            if isinstance(content, list):
                assert [part["type"] for part in content] == ["python", "python_output", "text"]
                assert str(calculate(content[0]["text"])) == content[1]["text"]


def test_tool_calls_repeat_the_question():
    for conversation in Arithmetic("train", 300):
        operands = re.findall(r"\d+", call(conversation))
        assert re.findall(r"\d+", question(conversation)) == operands
    for conversation in LetterCount("train", 300, WORDS):
        quoted = re.fullmatch(r'"( ?)([a-z]+)"\.count\("([a-z])"\)', call(conversation))
        before = ' "'[not quoted[1]]  # the character that the word's first token starts with
        assert before + quoted[2] in question(conversation)
        assert re.search(rf"\b{quoted[3]}\b", question(conversation))


@pytest.mark.parametrize(
    "completion, number",
    [
        ("1 + 1 = 2", 2),
        ("", None),
        ("The answer is -1,234.", -1234),
        ("345 - 678 = -333", -333),
        ("7 / 2 = 3.5", 3.5),
        ("none", None),
    ],
)
def test_final_number(completion, number):
    assert final_number(completion) == number


@pytest.mark.parametrize(
    "completion, right",
    [
        ("c-a-t", True),
        ("c, a, t.", True),
        ("C A T", True),
        ("c-a-t-s", False),
        ("c-at", False),
        ("cat", False),
        ("", False),
        ("The word is c-a-t", False),
    ],
)
def test_spelling_is_judged_strictly(completion, right):
    assert Spelling("train", 1, WORDS).evaluate({"answer": "cat"}, completion) is right


@needs_chitchat
def test_small_talk_alternates_is_clean_and_its_splits_are_disjoint():
    train, test = ChitChat("train"), ChitChat("test")
    texts, test_texts = (
        ["\n".join(m["content"] for m in c["messages"]) for c in task] for task in (train, test)
    )
    assert len(train) > 1_000 and len(test) > 80
    assert not set(texts) & set(test_texts)
    for task in (train, test):
        for conversation in task:
            roles = [message["role"] for message in conversation["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert chitchat.MIN_TURNS <= len(roles) <= chitchat.MAX_TURNS
            assert all(
                0 < len(m["content"]) <= chitchat.MAX_TURN_CHARACTERS
                for m in conversation["messages"]
            )
    everything = "\n".join(texts + test_texts).lower()
    assert everything.isascii()
    assert not re.search(r"fuck|shit|\bsex|@|www\.|http|instagram|my name is|\d{4}", everything)


@pytest.mark.parametrize(
    "turns, cleaned",
    [
        (
            [
                ["hello", "how are you"],
                ["im fine", "?"],
                ["i see"],
                ["ok!", "bye"],
                ["odd one out"],
            ],
            ["Hello. How are you.", "I'm fine?", "I see.", "Ok! Bye."],
        ),
        ([["hello"], ["hi"], ["bye"]], None),  # too short
        ([["hello"], ["hi"], ["my email is a@b.com"], ["ok"]], None),
        ([["hello"], ["hi"], ["this is such bullshit"], ["ok"]], None),
        ([["hello"], ["I'm Robert by the way"], ["nice"], ["ok"]], None),
        ([["hello"], ["hi"], ["are you from Ohio"], ["yes, I'm from Ohio"]], None),
        ([["hello"], ["hi"], ["asdfffffff"], ["ok"]], None),
        # three short turns before the long one
        ([["hello"], ["hi"], ["what's up"], ["very long" * 40], ["ok"]], None),
    ],
)
def test_cleaning_small_talk(turns, cleaned):
    assert chitchat.clean(turns) == cleaned


@needs_chitchat
@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_offline_mixture_holds_each_of_its_conversations_once(stage, tmp_path):
    paths = Paths(tmp_path)
    directory = paths.data("embedded")
    directory.mkdir()
    (directory / "words.txt").write_text("\n".join(WORDS))
    train, val = (tasks.offline_mixture(stage, split, paths) for split in ("train", "val"))
    mixture = train.task
    assert len(mixture) == sum(map(len, mixture.tasks))
    assert sorted(mixture.order) == [
        (t, i) for t, task in enumerate(mixture.tasks) for i in range(len(task))
    ]
    assert mixture.order == tasks.offline_mixture(stage, "train", paths).task.order
    chained = [message for conversation in train for message in conversation["messages"]]
    assert chained == [message for conversation in mixture for message in conversation["messages"]]
    assert (
        max(len(conversation["messages"]) for conversation in train)
        > 8
        > 2 * len(mixture) / len(train)
    )
    seen = {json.dumps(train[i]["messages"]) for i in range(0, len(train), 7)}
    assert not seen & {json.dumps(conversation["messages"]) for conversation in val}
    for name in tasks.eval_tasks_for("embedded"):
        task = tasks.load_eval_task(name, paths).view(stop=10)
        assert len(task) == 10 and task.eval_type == "generative" and task.baseline == 0


def test_a_reply_to_another_question_is_wrong():
    for task in skills("test", 100)[:3]:
        right = [task.evaluate(task[i], reply(task[(i + 1) % 100])) for i in range(100)]
        assert sum(right) < (50 if task.key == "letter_count" else 10)


def test_answering_once_does_not_pay_in_letter_counting():
    counts = Counter(conversation["answer"] for conversation in LetterCount("test", 1_000, WORDS))
    assert max(counts.values()) < 550 and len(counts) >= 3


def test_the_usual_ways_to_ask_are_trained():
    asked = [question(c) for c in Arithmetic("train", 1_000)] + [
        question(c) for c in Spelling("train", 1_000, WORDS)
    ]
    asked += [question(c) for c in LetterCount("train", 1_000, WORDS)]
    for form in (
        r"What is \d+ \+ \d+\?",
        r"What is \d+\*\d+\?",
        r"\d+ - \d+",
        r"Spell the word [a-z]+",
        r'How do you spell "[a-z]+"\?',
        r"How many [a-z] are in [a-z]+\?",
        r'How many [a-z] are in "[a-z]+"\?',
    ):
        assert any(re.fullmatch(form, text) for text in asked), form

"""Users' files of conversations and questions: formats, references, errors."""

import gzip
import json

import pytest
from task_helpers import questions, write_lines

from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.paths import Paths
from nanochat_jax.tasks import mixtures
from nanochat_jax.tasks.base import assistant, user
from nanochat_jax.tasks.custom_json import CustomJSON


def test_custom_json_reads_conversations(tmp_path):
    chats = [[user(f"{i} \u2028é"), assistant("b")] for i in range(3)]
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "\n\n".join(json.dumps(chat, ensure_ascii=False) for chat in chats) + "\n", encoding="utf-8"
    )
    assert [conversation["messages"] for conversation in CustomJSON(path)] == chats
    with pytest.raises(NotFound, match="missing.jsonl"):
        CustomJSON(tmp_path / "missing.jsonl")


def test_a_file_of_questions_is_a_categorical_task(tmp_path):
    answers = [
        (["x", "y", "z"], 2, "C"),
        (["x", "y"], "B", "B"),
        (["x", "y"], "y", "B"),
        (["A", "x"], "A", "A"),
    ]
    path = write_lines(
        tmp_path / "My-Quiz.jsonl",
        [{"question": "?", "choices": c, "answer": a} for c, a, _ in answers],
    )
    task = CustomJSON(path)
    assert (task.key, task.eval_type, task.baseline) == (
        "my_quiz",
        "categorical",
        pytest.approx((1 / 3 + 3 / 2) / 4),
    )
    for conversation, (choices, _, letter) in zip(task, answers, strict=True):
        assert conversation["letters"] == list("ABC"[: len(choices)])
        assert conversation["messages"][0]["content"].startswith(
            "Multiple Choice question: ?\n- " + choices[0] + "=A\n"
        )
        assert [each for each in conversation["letters"] if task.evaluate(conversation, each)] == [
            letter
        ]


@pytest.mark.parametrize(
    "value, message",
    [
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, "the answer 2 is no index"),
        (
            {"question": "?", "choices": ["B", "A"], "answer": "B"},
            "both a letter and the text of another choice",
        ),
        ({"question": "?", "choices": ["a", "b"], "answer": True}, "the answer True is no index"),
        ({"question": "?", "choices": ["a"], "answer": 0}, "1 choices: expected 2 to 26"),
        ({"question": "?", "choices": ["a", 3], "answer": 0}, "array of strings"),
        ({"choices": ["a", "b"], "answer": 0}, "no 'question'"),
        ({"text": "a"}, "no 'messages'"),
    ],
)
def test_a_bad_question_is_named(tmp_path, value, message):
    with pytest.raises(UsageError, match=f"quiz.jsonl line 1: .*{message}"):
        CustomJSON(write_lines(tmp_path / "quiz.jsonl", [value]))


def test_a_file_of_conversations_judges_its_last_message(tmp_path):
    chats = [[user("a"), assistant(reply)] for reply in ("It is  Paris.", "so\n#### 1,200")]
    system = {"messages": [{"role": "system", "content": "s"}, *chats[0]]}
    task = CustomJSON(write_lines(tmp_path / "chats.jsonl", [*chats, system]))
    assert task.eval_type == "generative" and len(task) == 3
    assert task.evaluate(task[0], " it is paris. ") and not task.evaluate(
        task[0], "It is Paris, France."
    )
    assert task.evaluate(task[1], "otherwise #### 1200") and not task.evaluate(task[1], "1200")
    assert task[2]["messages"][0]["role"] == "system"
    mixed = write_lines(
        tmp_path / "mixed.jsonl", [chats[0], {"question": "?", "choices": ["a", "b"], "answer": 0}]
    )
    with pytest.raises(UsageError, match="both conversations and questions"):
        CustomJSON(mixed)


HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
PARTS = [
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "2+2"},
    {"type": "python_output", "text": "4"},
    {"type": "text", "text": "four."},
]
AB = [user("a"), assistant("b")]


@pytest.mark.parametrize(
    "value, messages",
    [
        ({"messages": [user("a"), assistant(PARTS)]}, [user("a"), assistant(PARTS)]),
        ({"conversations": [HUMAN, GPT]}, AB),
        ({"conversations": AB}, AB),
        ([HUMAN, GPT], AB),
        ({"system": "s", "conversations": [HUMAN, GPT]}, [{"role": "system", "content": "s"}, *AB]),
        ({"instruction": "a", "input": "", "output": "b"}, AB),
        ({"instruction": "a", "output": "b"}, AB),
        ({"instruction": "a", "input": "x", "output": "b"}, [user("a\n\nx"), AB[1]]),
        ({"instruction": "a", "output": "b", "history": [["a", "b"]], "messages": None}, AB * 2),
    ],
)
@pytest.mark.parametrize("form", ["lines", "bom", "crlf", "gz", "array", "pretty"])
def test_layouts_are_known_by_their_keys(tmp_path, value, messages, form):
    path = tmp_path / ("chats.jsonl" + ".gz" * (form == "gz"))
    text = json.dumps(value) + "\n\n" + json.dumps(value)
    if form in ("array", "pretty"):
        text = json.dumps([value, value], indent=None if form == "array" else 2)
    data = text.replace("\n", "\r\n" if form == "crlf" else "\n").encode()
    path.write_bytes(
        gzip.compress(data) if form == "gz" else b"\xef\xbb\xbf" * (form == "bom") + data
    )
    task = CustomJSON(path)
    assert [conversation["messages"] for conversation in task] == [messages] * 2
    assert (task.key, task.eval_type) == ("chats", "generative")
    assert len(mixtures.named_mixture(f"{path}*2", Paths(tmp_path))) == 4


def said(*contents):
    return json.dumps(
        [{"role": role, "content": c} for role, c in zip(("user", "assistant"), contents)]
    )


BAD_LINES = {
    "[{]": "is not JSON",
    "[" * 100_000: "is not JSON: it is nested too deeply",
    '{"messages": [], "n": %s}' % ("1" * 5000): "is not JSON: Exceeds the limit",
    '{"messages": {}}': "expected an array of at least 2 messages",
    said("a"): "expected an array of at least 2",
    said("a", "b").replace("assistant", "user"): "message 1: the role should be assistant",
    said("a", 3): "message 1",
    '[{"role": ["user"], "content": "a"}, 3]': "message 1 needs a role and a content",
    said("a", ["b"]): "message 1: a part is a text of type",
    said("a", [{"type": [], "text": "b"}]): "message 1: a part is a text of",
    json.dumps({"conversations": [HUMAN, GPT | {"from": "tool"}]}): "message 1: the role should be",
    '{"instruction": "a", "output": 3}': "instruction, input and output must be strings",
    '{"instruction": "a", "output": "b", "history": 3}': "history must be an array of pairs",
    "3": "expected an object or an array",
    "null": "expected an object or an array",
    said("a", PARTS[1:3]): "the last message has no text",
    **{
        said("a", f"so #### {answer}"): "the answer .* is not a number"
        for answer in [
            "",
            *"forty 1,2 10:30 5-3 2024-01-02 5/0 1e9999".split(),
            "1 000",
            "1" * 5000,
        ]
    },
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_what_cannot_be_read_or_judged_is_refused_with_its_line(tmp_path, line):
    (tmp_path / "chats.jsonl").write_text(json.dumps(AB) + "\n" + line + "\n")
    with pytest.raises(UsageError, match=f"chats.jsonl line 2:? {BAD_LINES[line]}"):
        CustomJSON(tmp_path / "chats.jsonl")


def test_a_file_that_is_only_trained_on_needs_no_answers(tmp_path):
    path = write_lines(
        tmp_path / "chats.jsonl",
        [[user("a"), assistant("#### A heading")], [user("a"), assistant("")]],
    )
    assert len(CustomJSON(path, judged=False)) == 2


# reference | replies that are right | replies that are wrong
ANSWERS = r"""
#### 42 | so #### 42. ; #### $42 ; #### 42.0 ; #### **42** ; #### \boxed{42} ; ####42 apples |
#### -5 | #### −5 ; #### -$5.00 | #### 5
#### $1,234 | #### 1234 |
#### 1234 | #### 1\u202f234 |
#### 0.5 | #### 1/2 |
#### 1000 | #### 1e3 | #### 1 000
#### 1 | | #### 1e9999 ; #### {ones}
#### 7 | first #### 5, no, #### 7 ; #### 7\n#### That is all |
#### 7 | | #### 7 or rather #### 9 ; #### 7\n#### 7:30 ; 7 ; ##### 7 ; {empty}
#### 5\nno, #### 7 | #### 7 |
"""


def test_answers_after_the_hashes_are_compared_as_numbers(tmp_path):
    for line in ANSWERS.strip().splitlines():
        line = line.replace(r"\n", "\n").replace(r"\u202f", "\u202f").replace("{ones}", "1" * 5000)
        reference, *replies = line.split("|")
        path = write_lines(tmp_path / "q.jsonl", [[user("?"), assistant(reference.strip(" "))]])
        task = CustomJSON(path)
        for right, texts in zip((True, False), replies, strict=True):
            for reply in filter(None, (text.strip(" ") for text in texts.split(";"))):
                assert task.evaluate(task[0], reply.replace("{empty}", "")) is right, (line, reply)


def test_the_reference_is_the_text_of_its_parts(tmp_path):
    task = CustomJSON(write_lines(tmp_path / "q.jsonl", [[user("?"), assistant(PARTS)]]))
    assert task.evaluate(task[0], "it is  FOUR.") and not task.evaluate(task[0], "It is 2+24four.")


def test_splits_of_a_file_share_no_line(tmp_path):
    chats = [[user(str(i)), assistant("b")] for i in range(300)]
    path = write_lines(tmp_path / "chats.jsonl", chats)
    train, test = (questions(CustomJSON(path, split=split)) for split in ("train", "test"))
    assert not set(train) & set(test) and len(train) + len(test) == 300 and 10 < len(test) < 60

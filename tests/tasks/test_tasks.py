"""Upstream's tasks: their wording, order, answers and judgement, and how their data gets onto the
disk.
"""

import gzip
import importlib
import json
import os
import pkgutil
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer

from nanochat_jax import files, tasks
from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.infer.calculator import calculate
from nanochat_jax.paths import Paths
from nanochat_jax.tasks import gsm8k, hub, humaneval, mixtures, registry, spelling
from nanochat_jax.tasks.base import Task, TaskMixture, assistant, user
from nanochat_jax.tasks.custom_json import CustomJSON
from nanochat_jax.tasks.multiple_choice import multiple_choice
from nanochat_jax.tasks.skills import Arithmetic, Spelling

LINKED = ("task_data", "words_alpha.txt", "identity_conversations.jsonl")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was asked for something")

    monkeypatch.setattr(hub, "list_dataset", refuse)
    monkeypatch.setattr(hub, "fetch", refuse)
    monkeypatch.setattr(files.urllib.request, "urlopen", refuse)


@pytest.fixture
def paths(tmp_path, test_data, no_network) -> Paths:
    """A base directory that holds the reference data."""
    for name in LINKED:
        (tmp_path / name).symlink_to(test_data / "data" / name)
    return Paths(tmp_path)


class Count(Task):
    def __init__(self, size: int) -> None:
        self.size = size

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int):
        return {"messages": [user(f"{self.size}/{index}")]}


def said(task: Task) -> list[str]:
    return [conversation["messages"][0]["content"] for conversation in task]


# --------------------------------------------------------------------------------------- views, mix


@pytest.mark.parametrize(
    "view",
    [
        {},
        {"stop": 4},
        {"start": 3},
        {"start": 2, "stop": 9, "step": 3},
        {"stop": 99},
        {"start": 12},
    ],
)
def test_a_view_is_a_slice(view):
    expected = [f"10/{i}" for i in range(10)][
        view.get("start") : view.get("stop") : view.get("step")
    ]
    task = Count(10).view(**view)
    assert said(task) == expected and len(task) == len(expected)
    with pytest.raises(IndexError):
        task[len(expected)]


def test_a_mixture_holds_everything_once_in_the_order_of_random_42():
    mixture = TaskMixture([Count(5), Count(3).view(1), Count(5)])
    order = [(0, i) for i in range(5)] + [(1, i) for i in range(2)] + [(2, i) for i in range(5)]
    random.Random(42).shuffle(order)
    names = [
        ["5/0", "5/1", "5/2", "5/3", "5/4"],
        ["3/1", "3/2"],
        ["5/0", "5/1", "5/2", "5/3", "5/4"],
    ]
    assert said(mixture) == [names[task][i] for task, i in order]


def test_weights_are_passes_over_a_task():
    twice = TaskMixture([Count(5), Count(5), Count(3)])
    assert said(TaskMixture([Count(5), Count(3)], [2, 1])) == said(twice)
    counts = Counter(said(TaskMixture([Count(4), Count(3), Count(9)], [2.5, 1, 1 / 3])))
    assert counts == {
        "4/0": 3,
        "4/1": 3,
        "4/2": 2,
        "4/3": 2,
        "3/0": 1,
        "3/1": 1,
        "3/2": 1,
        "9/0": 1,
        "9/1": 1,
        "9/2": 1,
    }


def test_a_mixture_judges_by_the_task_that_a_conversation_is_of():
    mixture = TaskMixture([Arithmetic("test", 20), Spelling("test", 20, ["stone", "happy"])])
    replies = [
        "".join(part["text"] for part in content) if isinstance(content, list) else content
        for content in (conversation["messages"][1]["content"] for conversation in mixture)
    ]
    assert all(map(mixture.evaluate, mixture, replies))
    assert not any(mixture.evaluate(conversation, "b-a-d 0") for conversation in mixture)


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


# --------------------------------------------------------------------------------------- wording an


def test_multiple_choice_to_the_byte():
    conversation = multiple_choice("Which is blue?", ["grass", "the sky"], "AB", "B")
    assert conversation["messages"] == [
        user(
            "Multiple Choice question: Which is blue?\n- grass=A\n- the sky=B\n\n"
            "Respond only with the letter of the correct answer."
        ),
        {"role": "assistant", "content": "B"},
    ]
    assert conversation["letters"] == ["A", "B"]
    with pytest.raises(ValueError, match="'C'"):
        multiple_choice("Which?", ["a", "b"], "AB", "C")


def test_gsm8k_solution_becomes_tool_calls():
    solution = "Half of 24 is <<24/2=12>>12.\nSo <<12==12>><<1+1=2>>fine\n#### 1,012"
    assert gsm8k.parse_solution(solution) == [
        {"type": "text", "text": "Half of 24 is "},
        {"type": "python", "text": "24/2"},
        {"type": "python_output", "text": "12"},
        {"type": "text", "text": "12.\nSo "},
        {"type": "python", "text": "12="},
        {"type": "python_output", "text": "12"},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "fine\n#### 1,012"},
    ]


@pytest.mark.parametrize(
    "completion, right",
    [
        ("So #### 1012", True),
        ("#### 1,012 apples", True),
        ("#### 1012\n#### 7", True),
        ("#### 1012.0", False),
        ("1012", False),
        ("####1012", False),
        ("", False),
        ("#### -1012", False),
    ],
)
def test_gsm8k_judgement(completion, right):
    conversation = {
        "messages": [
            user("?"),
            {"role": "assistant", "content": gsm8k.parse_solution("So\n#### 1,012")},
        ]
    }
    assert gsm8k.same_final_answer(conversation, completion) is right


def test_humaneval_extraction():
    prompt = "# a comment\nfrom typing import List\n\nimport math\n\ndef f():\n    import os\n"
    assert humaneval.extract_imports(prompt) == "from typing import List\nimport math"
    assert humaneval.extract_program("Sure:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1"
    assert humaneval.extract_program("```\nx = 2\n```") == "x = 2"
    assert humaneval.extract_program(" x = 3 \n") == "x = 3"


def test_spelling_bee_counts_and_its_test_items_are_no_training_items():
    words = [
        f"{a}{b}"
        for a in ("abra", "berry", "cable", "dodge")
        for b in ("cadabra", "bee", "bell", "dad", "zoo")
    ]
    assert (len(spelling.QUESTIONS), len(set(spelling.QUESTIONS))) == (51, 51)
    train, test = (spelling.SpellingBee(words, split, size=300) for split in ("train", "test"))
    for conversation in [*train, *test]:
        manual, _, call, output, final = (
            part["text"] for part in conversation["messages"][1]["content"]
        )
        count = calculate(call)
        word = call.split("'")[1]
        assert output == str(count) and final.endswith(f"#### {count}")
        assert f"{word}:{','.join(word)}\n" in manual and manual.count(" hit! count=") == count
        assert f"\n{len(word)}:{word[-1]}" in manual
        assert train.evaluate(conversation, manual + final) and not train.evaluate(
            conversation, f"#### {count + 1}"
        )
        assert word in conversation["messages"][0]["content"]
    # A handful of equal questions is chance; seeds that repeat would make all of them equal.
    assert len({*said(train)} & {*said(test)}) < 30
    assert said(train) == said(spelling.SpellingBee(words, "train", size=300))


def test_simple_spelling_form():
    words = [f"word{chr(97 + i)}" for i in range(26)]
    task = spelling.SimpleSpelling(words, "train", size=50)
    for conversation in task:
        asked, reply = (message["content"] for message in conversation["messages"])
        word = asked.removeprefix("Spell the word: ")
        assert word in words and reply == f"{word}:{','.join(word)}"
    assert said(task) != said(spelling.SimpleSpelling(words, "test", size=50))


# --------------------------------------------------------------------------------------- own conver


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no conversation"),
        ("[{]", "line 1 is not JSON"),
        ('[{"role": "user", "content": "a"}]', "line 1: expected an array of at least 2"),
        (
            '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]',
            "line 1: message 1: the role should be assistant",
        ),
        (
            '\n[{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}]',
            "line 2: message 1",
        ),
    ],
)
def test_custom_json_names_the_bad_line(tmp_path, content, message):
    path = tmp_path / "chats.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        CustomJSON(path)


def test_custom_json_reads_conversations(tmp_path):
    chats = [
        [{"role": "user", "content": f"{i} \u2028é"}, {"role": "assistant", "content": "b"}]
        for i in range(3)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "\n\n".join(json.dumps(chat, ensure_ascii=False) for chat in chats) + "\n", encoding="utf-8"
    )
    assert [conversation["messages"] for conversation in CustomJSON(path)] == chats
    with pytest.raises(NotFound, match="missing.jsonl"):
        CustomJSON(tmp_path / "missing.jsonl")


def write_lines(path, values):
    path.write_text("\n".join(map(json.dumps, values)))
    return path


def test_a_file_of_questions_is_a_categorical_task(tmp_path):
    """The answer as an index, a letter or a text of its choice."""
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
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": reply}]
        for reply in ("It is  Paris.", "so\n#### 1,200")
    ]
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
AB = [user("a"), {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "value, messages",
    [
        (
            {"messages": [user("a"), {"role": "assistant", "content": PARTS}]},
            [user("a"), assistant(PARTS)],
        ),
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


@pytest.mark.parametrize(
    "line, message",
    [
        ("[" * 100_000, "line 2 is not JSON: it is nested too deeply"),
        ('{"messages": [], "n": %s}' % ("1" * 5000), "line 2 is not JSON: Exceeds the limit"),
        ('{"messages": {}}', "line 2: expected an array of at least 2 messages"),
        ('[{"role": ["user"], "content": "a"}, 3]', "line 2: message 1 needs a role and a content"),
        (json.dumps([user("a"), assistant(["b"])]), "line 2: message 1: a part is a text of type"),
        (
            json.dumps([user("a"), assistant([{"type": [], "text": "b"}])]),
            "line 2: message 1: a part is a text of",
        ),
        (
            json.dumps({"conversations": [HUMAN, GPT | {"from": "tool"}]}),
            "line 2: message 1: the role should be",
        ),
        (
            json.dumps({"instruction": "a", "output": 3}),
            "line 2: instruction, input and output must be strings",
        ),
        (
            json.dumps({"instruction": "a", "output": "b", "history": 3}),
            "line 2: history must be an array of pairs",
        ),
        ("3", "line 2: expected an object or an array"),
        ("null", "line 2: expected an object or an array"),
        (json.dumps([user("a"), assistant(PARTS[1:3])]), "line 2: the last message has no text"),
        *[
            (
                json.dumps([user("a"), assistant(f"so #### {answer}")]),
                "line 2: the answer .* is not a number",
            )
            for answer in (
                "",
                "forty",
                "1,2",
                "10:30",
                "5-3",
                "1 000",
                "2024-01-02",
                "1" * 5000,
                "5/0",
                "1e9999",
            )
        ],
    ],
)
def test_what_cannot_be_read_or_judged_is_refused_with_its_line(tmp_path, line, message):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(AB) + "\n" + line + "\n")
    with pytest.raises(UsageError, match=f"chats.jsonl {message}"):
        CustomJSON(path)


def test_a_file_that_is_only_trained_on_needs_no_answers(tmp_path):
    path = write_lines(
        tmp_path / "chats.jsonl",
        [[user("a"), assistant("#### A heading")], [user("a"), assistant("")]],
    )
    assert len(CustomJSON(path, judged=False)) == 2


@pytest.mark.parametrize(
    "reference, reply, right",
    [
        ("#### 42", "so #### 42.", True),
        ("#### 42", "#### $42", True),
        ("#### 42", "#### 42.0", True),
        ("#### 42", "#### **42**", True),
        ("#### 42", r"#### \boxed{42}", True),
        ("#### 42", "####42 apples", True),
        ("#### -5", "#### \u22125", True),
        ("#### -5", "#### -$5.00", True),
        ("#### -5", "#### 5", False),
        ("#### $1,234", "#### 1234", True),
        ("#### 1234", "#### 1\u202f234", True),
        ("#### 0.5", "#### 1/2", True),
        ("#### 1000", "#### 1e3", True),
        ("#### 1000", "#### 1 000", False),
        ("#### 1", "#### 1e9999", False),
        ("#### 7", "first #### 5, no, #### 7", True),
        ("#### 7", "#### 7 or rather #### 9", False),
        ("#### 7", "#### 7\n#### 7:30", False),
        ("#### 7", "#### 7\n#### That is all", True),
        ("#### 7", "7", False),
        ("#### 7", "", False),
        ("#### 7", "##### 7", False),
        ("#### 5\nno, #### 7", "#### 7", True),
        ("#### 1", "#### " + "1" * 5000, False),
    ],
)
def test_answers_after_the_hashes_are_compared_as_numbers(tmp_path, reference, reply, right):
    task = CustomJSON(write_lines(tmp_path / "q.jsonl", [[user("?"), assistant(reference)]]))
    assert task.evaluate(task[0], reply) is right


def test_the_reference_is_the_text_of_its_parts(tmp_path):
    task = CustomJSON(write_lines(tmp_path / "q.jsonl", [[user("?"), assistant(PARTS)]]))
    assert task.evaluate(task[0], "it is  FOUR.") and not task.evaluate(task[0], "It is 2+24four.")


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


def test_a_mixture_that_would_fill_the_memory_is_refused(tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", [AB] * 5)
    with pytest.raises(
        UsageError,
        match="takes 500,000,000 conversations, more than 20,000,000: give smaller weights",
    ):
        mixtures.named_mixture(f"{path}*1e8", Paths(tmp_path))


@pytest.mark.parametrize(
    "table, message",
    [
        ({"question": ["a"]}, "has 0 columns 'answer'"),
        ({"question": ["a"], "answer": [None]}, "has rows without 'answer'"),
    ],
)
def test_rows_that_a_task_cannot_read_are_refused(tmp_path, no_network, table, message):
    folder = tmp_path / "task_data/openai--gsm8k/main/train"
    folder.mkdir(parents=True)
    pq.write_table(pa.table(table), folder / "00000.parquet")
    (folder / "manifest.json").write_text('["00000.parquet"]')
    with pytest.raises(UsageError, match=message):
        gsm8k.GSM8K(Paths(tmp_path), "train")


def test_splits_of_a_file_share_no_line(tmp_path):
    chats = [
        [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "b"}]
        for i in range(300)
    ]
    path = write_lines(tmp_path / "chats.jsonl", chats)
    train, test = (said(CustomJSON(path, split=split)) for split in ("train", "test"))
    assert not set(train) & set(test) and len(train) + len(test) == 300 and 10 < len(test) < 60


# --------------------------------------------------------------------------------------- getting th


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """Two parquet files of one split at the pinned commit, and others; the client is told to ask
    this server.
    """
    with HubServer() as server:
        pq.write_table(pa.table({"n": list(range(10))}), tmp_path / "whole.parquet")
        for start in (5, 0):
            pq.write_table(pa.table({"n": list(range(start, start + 5))}), tmp_path / "x.parquet")
            server.add(
                "owner/name",
                f"main/train-{start:05d}-of-00002.parquet",
                (tmp_path / "x.parquet").read_bytes(),
            )
        server.add(
            "owner/name", "main/test-00000-of-00001.parquet", (tmp_path / "x.parquet").read_bytes()
        )
        server.add("owner/name", "README.md", b"# Data")
        yield server


FETCH = """
import json, sys
from pathlib import Path
from nanochat_jax.errors import NotFound
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.hub import HubData, load_split
commit, split, base = sys.argv[1:]
try:
    print(json.dumps(load_split(Paths(Path(base)), HubData("owner/name", commit), "main", split)["n"].to_pylist()))
except NotFound as error:
    print(json.dumps(str(error)))
"""


def fetch_split(server, tmp_path, split="train", **environment):
    """In a process of its own, as the Hub's client reads its environment when it is imported."""
    env = os.environ | server.environment(tmp_path) | environment
    arguments = [sys.executable, "-c", FETCH, server.commit("owner/name"), split, str(tmp_path)]
    return json.loads(
        subprocess.run(arguments, env=env, capture_output=True, text=True, check=True).stdout
    )


def test_a_split_is_fetched_once_and_in_order(tmp_path, hub_server):
    folder = tmp_path / "task_data/owner--name/main/train"
    folder.mkdir(parents=True)
    (folder / "00000.parquet").write_bytes(b"torn")  # without a manifest: fetched again
    hub_server.faults["main/train-00005-of-00002.parquet"] = "torn"
    assert fetch_split(hub_server, tmp_path) == list(range(10))
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000.parquet",
        "00001.parquet",
        "manifest.json",
        "source.json",
    ]
    assert json.loads((folder / "manifest.json").read_text()) == ["00000.parquet", "00001.parquet"]
    source = json.loads((folder / "source.json").read_text())
    assert source["revision"] == hub_server.commit("owner/name") and source["files"][1].startswith(
        "main/train-00005"
    )
    assert {path.name for path in folder.parent.iterdir()} == {"train", ".train.lock"}
    hub_server.requests.clear()
    assert fetch_split(hub_server, tmp_path) == list(range(10)) and not hub_server.requests

    class Order(hub.HubTask):
        data = hub.HubData("owner/name", "commit")
        columns = ("n",)

        def get_example(self, index):
            return self.row(index)

    task = Order(Paths(tmp_path), "main", "train")
    assert [row["n"] for row in task] == np.random.default_rng(42).permutation(10).tolist()


def test_data_that_cannot_be_had_is_an_error_that_names_it(tmp_path, hub_server):
    second = "main/train-00005-of-00002.parquet"
    hub_server.faults[second] = "gated"
    message = fetch_split(hub_server, tmp_path)
    assert "data set owner/name (main, train) is not in" in message and "GatedRepoError" in message
    folder = tmp_path / "task_data/owner--name/main/train"
    assert [path.name for path in folder.iterdir()] == [".partial"], "nothing that looks complete"
    message = fetch_split(hub_server, tmp_path, "validation")
    assert (
        "owner/name (main, validation)" in message
        and "it has no files main/validation-*.parquet" in message
    )
    assert "owner/name (main, train)" in fetch_split(hub_server, tmp_path, HF_HUB_OFFLINE="1")
    hub_server.faults.clear()
    hub_server.requests.clear()
    assert fetch_split(hub_server, tmp_path) == list(range(10))
    assert hub_server.asked("GET /cdn/") == 1  # the first file was there already


@pytest.mark.parametrize(
    "files, manifest",
    [
        ([], '["00000.parquet"]'),
        (["00000.parquet"], "[broken"),
        ([], "[]"),
        ([], "[" * 100_000),
        ([], "3"),
        ([], "[3]"),
    ],
)
def test_damaged_data_is_an_error(tmp_path, no_network, files, manifest):
    folder = tmp_path / "task_data/owner--name/main/train"
    folder.mkdir(parents=True)
    for file in files:
        pq.write_table(pa.table({"n": [1]}), folder / file)
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(UsageError, match=r"owner/name \(main, train\)"):
        hub.load_split(Paths(tmp_path), hub.HubData("owner/name", "commit"), "main", "train")


# --------------------------------------------------------------------------------------- the real d


@pytest.mark.parametrize(
    "name, key, eval_type, baseline, size",
    [
        ("ARC-Easy", "arc_easy", "categorical", 0.25, 1521),
        ("ARC-Challenge", "arc_challenge", "categorical", 0.25, 779),
        ("MMLU", "mmlu", "categorical", 0.25, 9214),
        ("GSM8K", "gsm8k", "generative", 0.0, 862),
        ("HumanEval", "humaneval", "generative", 0.0, 94),
        ("SpellingBee", "spelling_bee", "generative", 0.0, 256),
    ],
)
def test_evaluation_tasks_on_real_rows(paths, name, key, eval_type, baseline, size):
    task = tasks.load_eval_task(name, paths)
    assert (task.key, task.eval_type, task.baseline, len(task)) == (key, eval_type, baseline, size)
    few = task.view(stop=7)
    assert [c["messages"] for c in few] == [task[i]["messages"] for i in range(7)]
    for conversation in (task[i] for i in range(0, size, 1 if eval_type == "categorical" else 10)):
        question, reply = conversation["messages"]
        assert (question["role"], reply["role"]) == ("user", "assistant")
        if eval_type == "categorical":
            letters = conversation["letters"]
            assert 2 < len(letters) < 6 and len(set(letters)) == len(letters)
            assert [task.evaluate(conversation, letter) for letter in letters].count(True) == 1
            for letter in letters:
                assert f"={letter}\n" in question["content"]
        elif name != "HumanEval":
            assert task.evaluate(conversation, reply["content"][-1]["text"])
            assert not task.evaluate(conversation, "#### 123456")


def test_rows_are_in_the_order_of_numpys_permutation(paths):
    table = pq.read_table(paths.task_data / "openai--gsm8k/main/train/00000.parquet")
    order = np.random.default_rng(42).permutation(table.num_rows)
    task = gsm8k.GSM8K(paths, "train").view(stop=50)
    assert said(task) == [table["question"][int(i)].as_py() for i in order[:50]]


def test_gsm8k_parts_are_the_solution(paths):
    table = pq.read_table(paths.task_data / "openai--gsm8k/main/test/00000.parquet")
    for answer in table["answer"].to_pylist():
        parts = gsm8k.parse_solution(answer)
        forms = {"text": "{}", "python": "<<{}=", "python_output": "{}>>"}
        assert "".join(forms[part["type"]].format(part["text"]) for part in parts) == answer
        assert sum(part["type"] == "python" for part in parts) == answer.count("<<")


def test_humaneval_runs_the_tests(paths):
    task = tasks.load_eval_task("HumanEval", paths).view(stop=2)
    for conversation in task:
        solution = conversation["messages"][1]["content"]
        assert task.evaluate(conversation, f"Here it is:\n```python\n{solution}\n```")
        assert not task.evaluate(
            conversation, conversation["messages"][0]["content"] + "    return None\n"
        )


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


def leaves(task_class):
    below = task_class.__subclasses__()
    return [leaf for each in below for leaf in leaves(each)] if below else [task_class]


def test_every_task_of_the_package_is_in_the_table_and_complete(paths):
    paths.data("embedded").mkdir()
    (paths.data("embedded") / "words.txt").write_text("stone happy river window copper")
    evaluated = {name: load(paths, "test") for name, load in registry.EVAL_TASKS.items()}
    mixed = [load(paths, "test") for load in registry.MIXED.values()]
    for name, task in evaluated.items():
        assert tasks.eval_task_name(task.key) == name and task.eval_type and len(task) > 0
        assert type(task).evaluate is not Task.evaluate
        assert tasks.load_eval_task(task.key, paths).key == task.key
    for module in pkgutil.iter_modules(tasks.__path__):
        importlib.import_module(f"nanochat_jax.tasks.{module.name}")
    in_table = {type(task) for task in [*evaluated.values(), *mixed]}
    for leaf in leaves(Task):
        if leaf.__module__.startswith("nanochat_jax.tasks."):
            assert leaf in {*in_table, TaskMixture, mixtures.Chained}, f"{leaf} has no entry"
            if issubclass(leaf, hub.HubTask):
                assert re.fullmatch("[0-9a-f]{40}", leaf.data.commit)
    offline, upstream = map(tasks.eval_tasks_for, ("embedded", "fineweb"))
    assert sorted(offline + upstream) == sorted(evaluated)


def test_unknown_names_and_splits_are_refused(tmp_path):
    with pytest.raises(UsageError, match="'GSM9K': expected one of ARC-Easy"):
        tasks.load_eval_task("GSM9K", Paths(tmp_path))
    with pytest.raises(UsageError, match="only the split test"):
        tasks.load_eval_task("HumanEval", Paths(tmp_path), "train")

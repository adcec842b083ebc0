"""Wording and evaluation of upstream's tasks."""

import pytest
from task_helpers import questions

from nanochat_jax.infer.calculator import calculate
from nanochat_jax.tasks import gsm8k, humaneval, spelling
from nanochat_jax.tasks.base import user
from nanochat_jax.tasks.multiple_choice import multiple_choice


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
    assert len(set(spelling.PHRASES["spelling_bee"])) == 51
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
    assert len({*questions(train)} & {*questions(test)}) < 30
    assert questions(train) == questions(spelling.SpellingBee(words, "train", size=300))


def test_simple_spelling_form():
    words = [f"word{chr(97 + i)}" for i in range(26)]
    task = spelling.SimpleSpelling(words, "train", size=50)
    for conversation in task:
        asked, reply = (message["content"] for message in conversation["messages"])
        word = asked.removeprefix("Spell the word: ")
        assert word in words and reply == f"{word}:{','.join(word)}"
    assert questions(task) != questions(spelling.SimpleSpelling(words, "test", size=50))

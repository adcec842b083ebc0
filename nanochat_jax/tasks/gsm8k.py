"""GSM8K: grade-school math word problems (Cobbe et al. 2021, arXiv:2110.14168).

A solution contains calculator calls as `<<12*3=36>>` and ends with `#### 36`.
"""

import re

from nanochat_jax.paths import Paths
from nanochat_jax.tasks.base import Conversation, Part, assistant, python, python_output, text, user
from nanochat_jax.tasks.hub import HubData, HubTask

CALL = re.compile(r"<<([^>]+)>>")
FINAL_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def final_answer(reply: str) -> str | None:
    """The number after the first `#### `, without commas."""
    match = FINAL_ANSWER.search(reply)
    return match[1].strip().replace(",", "") if match else None


def parse_solution(solution: str) -> list[Part]:
    """Text, calculator calls and their results, in order."""
    parts: list[Part] = []
    for i, piece in enumerate(CALL.split(solution)):
        if i % 2:
            expression, _, result = piece.rpartition("=")
            parts += [python(expression), python_output(result)]
        elif piece:
            parts.append(text(piece))
    return parts


def same_final_answer(conversation: Conversation, completion: str) -> bool:
    """Whether the reply has the reference's `#### number`; a reply without one is wrong."""
    expected = final_answer(conversation["messages"][-1]["content"][-1]["text"])
    if expected is None:
        raise ValueError(f"no final answer in the reference {conversation['messages'][-1]!r}")
    return final_answer(completion) == expected


class GSM8K(HubTask):
    """The configuration `main` of the data set."""

    data = HubData("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee")
    columns = ("question", "answer")
    key = "gsm8k"
    eval_type = "generative"

    def __init__(self, paths: Paths, split: str) -> None:
        super().__init__(paths, "main", split)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        return {"messages": [user(row["question"]), assistant(parse_solution(row["answer"]))]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return same_final_answer(conversation, completion)

"""Views and mixtures of tasks."""

import random
from collections import Counter

import pytest
from task_helpers import questions

from nanochat_jax.tasks.base import Task, TaskMixture, user
from nanochat_jax.tasks.skills import Arithmetic, Spelling


class Count(Task):
    def __init__(self, size: int) -> None:
        self.size = size

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int):
        return {"messages": [user(f"{self.size}/{index}")]}


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
    assert questions(task) == expected and len(task) == len(expected)
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
    assert questions(mixture) == [names[task][i] for task, i in order]


def test_weights_are_passes_over_a_task():
    twice = TaskMixture([Count(5), Count(5), Count(3)])
    assert questions(TaskMixture([Count(5), Count(3)], [2, 1])) == questions(twice)
    counts = Counter(questions(TaskMixture([Count(4), Count(3), Count(9)], [2.5, 1, 1 / 3])))
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

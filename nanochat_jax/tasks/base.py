"""The interface of a task: conversations by index, and evaluation of a reply.

Conversations have the form of conversation.py, and may have other keys. The last message of an
"""

import copy
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from nanochat_jax.errors import UsageError

# The wordings of generated conversations, by task.
PHRASES: dict[str, Any] = json.loads(Path(__file__).with_name("phrases.json").read_text("utf-8"))


Conversation = dict[str, Any]
Part = dict[str, str]


class Task:
    """`num_examples()` conversations, or those selected by a `view`.

    A generative task evaluates the text of a reply. A categorical one asks for one of the letters
    in `conversation["letters"]`. A task without `eval_type` is only for training.
    """

    key = ""  # name of its result, in snake case; empty if only for training
    eval_type: Literal["generative", "categorical"] | None = None
    baseline = 0.0  # accuracy of random guessing
    shown: range | None = None  # of a view: indices of its conversations in the full task

    def num_examples(self) -> int:
        """Size of the full task."""
        raise NotImplementedError

    def get_example(self, index: int) -> Conversation:
        """Conversation `index` of the full task, 0 <= index < num_examples()."""
        raise NotImplementedError

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether `completion` is correct.

        `completion` is the chosen letter of a categorical task, otherwise the visible text of the
        reply, without control tokens, tool calls and their results.
        """
        raise TypeError(f"{type(self).__name__} is only for training, it cannot judge a reply")

    def _indices(self) -> range:
        return range(self.num_examples()) if self.shown is None else self.shown

    def __len__(self) -> int:
        return len(self._indices())

    def __getitem__(self, index: int) -> Conversation:
        return self.get_example(self._indices()[index])

    def view(
        self, start: int | None = None, stop: int | None = None, step: int | None = None
    ) -> Self:
        """The conversations start:stop:step, like a list slice."""
        view = copy.copy(self)
        view.shown = self._indices()[start:stop:step]
        return view

    def __iter__(self) -> Iterator[Conversation]:
        return (self[i] for i in range(len(self)))


MAX_CONVERSATIONS = 20_000_000  # of a mixture, whose order is a list of about 2 GB


class TaskMixture(Task):
    """All conversations of several tasks in one fixed random order, each evaluated by its own task.

    `weights` are passes over each task (default 1): 2.5 is two passes and the first half once more.
    Raises `UsageError` for more than `MAX_CONVERSATIONS`.
    """

    def __init__(self, tasks: Sequence[Task], weights: Sequence[float] | None = None) -> None:
        self.tasks = list(tasks)
        counts = [
            round(w * len(task)) for task, w in zip(tasks, weights or [1] * len(tasks), strict=True)
        ]
        if sum(counts) > MAX_CONVERSATIONS:
            raise UsageError(
                f"the mixture takes {sum(counts):,} conversations, more than "
                f"{MAX_CONVERSATIONS:,}: give smaller weights, and train for more epochs"
            )
        self.order = [
            (t, i % len(self.tasks[t])) for t, count in enumerate(counts) for i in range(count)
        ]
        random.Random(42).shuffle(self.order)

    def num_examples(self) -> int:
        return len(self.order)

    def get_example(self, index: int) -> Conversation:
        task, i = self.order[index]
        return self.tasks[task][i] | {"task": task}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return self.tasks[conversation["task"]].evaluate(conversation, completion)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str | list[Part]) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def text(value: str) -> Part:
    return {"type": "text", "text": value}


def python(expression: str) -> Part:
    return {"type": "python", "text": expression}


def python_output(value: str) -> Part:
    return {"type": "python_output", "text": value}

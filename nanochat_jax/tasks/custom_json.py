"""Tasks of one's own, without code: a JSON Lines file of conversations or of questions with choices."""

import json
import string
from pathlib import Path
from typing import Any, Literal

from nanochat_jax.cli import NotFound, UsageError
from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tasks.gsm8k import final_answer
from nanochat_jax.tasks.multiple_choice import multiple_choice
from nanochat_jax.tasks.skills import split_of


class CustomJSON(Task):
    """A file whose lines are all of one kind; blank ones are skipped.

    - `[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]`, or `{"messages": [...]}`:
      judged by what is written in place of the last message. It is right if it ends in the same `#### number`, where the
      reference has one, else if it is the reference, whatever its case and white space.
    - `{"question": "...", "choices": ["...", ...], "answer": 0}`: judged by the likeliest letter. The answer is the index
      of a choice, its letter, or the choice itself.

    A missing file or a line of another form is an error that names it. `split` takes nine tenths of the lines ("train")
    or the rest ("test"), by a hash of each.
    """

    def __init__(self, path: Path, *, split: Literal["train", "test"] | None = None) -> None:
        self.path = Path(path)
        self.key = self.path.stem.lower().replace("-", "_").replace(" ", "_")
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError as error:
            raise NotFound(f"no conversations in {self.path}: the file does not exist") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.path} cannot be read as text: {error}") from error
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not numbered:
            raise UsageError(f"{self.path} holds no conversation")
        parsed = [(line, self._parse(line, number)) for number, line in numbered]
        kinds = {"letters" in conversation for _, conversation in parsed}
        if len(kinds) > 1:
            raise UsageError(f"{self.path} holds both conversations and questions with choices: make two files of it")
        self.conversations = [conversation for line, conversation in parsed if split in (None, split_of(line))]
        if not self.conversations:
            raise UsageError(f"{self.path}: none of its {len(parsed)} lines falls to the split {split}: give more")
        self.eval_type = "categorical" if kinds == {True} else "generative"
        if self.eval_type == "categorical":
            self.baseline = sum(1 / len(each["letters"]) for each in self.conversations) / len(self.conversations)

    def _parse(self, line: str, number: int) -> Conversation:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{self.path} line {number} is not JSON: {error}") from error
        try:
            if isinstance(value, dict) and "choices" in value:
                return _question(value)
            return {"messages": _messages(value["messages"] if isinstance(value, dict) else value)}
        except (ValueError, KeyError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UsageError(f"{self.path} line {number}: {said}") from error

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        return self.conversations[index]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        reference = conversation["messages"][-1]["content"]
        if self.eval_type == "generative" and (number := final_answer(reference)) is not None:
            return final_answer(completion) == number
        return " ".join(completion.split()).casefold() == " ".join(reference.split()).casefold()


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError("expected an array of at least 2 messages")
    first = 1 if isinstance(messages[0], dict) and messages[0].get("role") == "system" else 0
    for i, message in enumerate(messages):
        role = "system" if i < first else ("user", "assistant")[(i - first) % 2]
        fields = message if isinstance(message, dict) else {}
        if fields.get("role") != role or not isinstance(fields.get("content"), str):
            raise ValueError(f"message {i} needs the role {role!r} and a string as content")
    if (len(messages) - first) % 2:
        raise ValueError(f"message {len(messages) - 1} has nothing after it: the last one must be the assistant's")
    return messages


def _question(value: dict[str, Any]) -> Conversation:
    question, choices, answer = value["question"], value["choices"], value["answer"]
    if not isinstance(question, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise ValueError("question must be a string and choices an array of strings")
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise ValueError(f"{len(choices)} choices: expected 2 to {len(string.ascii_uppercase)}")
    letters = list(string.ascii_uppercase[: len(choices)])
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = letters[answer]
    elif answer in letters and choices.count(answer) == 1 and choices[letters.index(answer)] != answer:
        raise ValueError(f"the answer {answer!r} is both a letter and the text of another choice: give the index")
    elif choices.count(answer) == 1:
        answer = letters[choices.index(answer)]
    elif answer not in letters:
        raise ValueError(f"the answer {answer!r} is no index, letter or text of the {len(choices)} choices")
    return multiple_choice(question, choices, letters, answer)

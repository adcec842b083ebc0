"""Tasks from a user's JSON file of conversations, or of questions with choices."""

import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from nanochat_jax.conversation import text_of, turns_of
from nanochat_jax.data.convert import COMPRESSIONS, open_text
from nanochat_jax.errors import UsageError
from nanochat_jax.files import parse_json
from nanochat_jax.tasks.answers import has_answer, last_answer, same_text
from nanochat_jax.tasks.base import Conversation, Task, assistant, user
from nanochat_jax.tasks.multiple_choice import multiple_choice
from nanochat_jax.tasks.skills import split_of


class CustomJSON(Task):
    """A file of records of one type: one per line (JSON Lines) or in one JSON array.

    The keys of a record determine its format; docs/data.md lists them. A reply is correct if its
    last `#### number` has the value of the reference's; if the reference has none, if the texts are
    equal except for case and white space.

    Args:
      split: "train" (nine tenths of the records, by a hash of each), "test" (the rest) or None
        (all).
      judged: reject references that cannot be used for evaluation. False for training only.

    Raises `NotFound` or `UsageError` with the file and the line if the file cannot be read or
    parsed.
    """

    def __init__(
        self, path: Path, *, split: Literal["train", "test"] | None = None, judged: bool = True
    ) -> None:
        self.path = Path(path)
        packed = self.path.suffix.lower().removeprefix(".") in COMPRESSIONS
        name = Path(self.path.stem).stem if packed else self.path.stem
        self.key = name.lower().replace("-", "_").replace(" ", "_")
        records: list[tuple[str, Conversation]] = []
        for position, text, value in self._records():
            try:
                conversation = _conversation(value)
                if judged and "letters" not in conversation:
                    _check_reference(conversation["messages"][-1]["content"])
            except ValueError as error:
                raise UsageError(f"{self.path} {position}: {error}") from error
            records.append((text, conversation))
        if not records:
            raise UsageError(f"{self.path} holds no conversation")
        has_letters = {"letters" in conversation for _, conversation in records}
        if len(has_letters) > 1:
            raise UsageError(
                f"{self.path} holds both conversations and questions with choices: split it into "
                "two files"
            )
        self.conversations = [
            conversation for text, conversation in records if split in (None, split_of(text))
        ]
        if not self.conversations:
            raise UsageError(
                f"{self.path}: none of its {len(records)} records is in the split {split}: add more"
            )
        self.eval_type = "generative"
        if has_letters == {True}:
            self.eval_type = "categorical"
            chances = [1 / len(conversation["letters"]) for conversation in self.conversations]
            self.baseline = sum(chances) / len(chances)

    def _records(self) -> Iterator[tuple[str, str, Any]]:
        """(position, text, value) of each record."""
        with open_text(self.path) as file:
            text = file.read()
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        values: list[Any] = []
        try:
            values = _values(parse_json(text), len(lines))
        except ValueError as error:
            if lines and lines[0][1].strip() in ("[", "{"):  # one value over several lines
                raise UsageError(f"{self.path} is not JSON: {error}") from error
        if values:
            for number, value in enumerate(values, 1):
                yield f"record {number}", json.dumps(value), value
            return
        for number, line in lines:
            try:
                yield f"line {number}", line, parse_json(line)
            except ValueError as error:
                raise UsageError(f"{self.path} line {number} is not JSON: {error}") from error

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        return self.conversations[index]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        reference = _reference(conversation)
        if self.eval_type == "generative" and has_answer(reference):
            return last_answer(completion) == last_answer(reference)
        return same_text(completion, reference)


def _values(whole: Any, num_lines: int) -> list[Any]:
    """The records of a file that is one JSON value; empty if it must be read as JSON Lines."""
    if isinstance(whole, list) and not any(map(_is_message, whole)):
        return whole
    return [whole] if num_lines > 1 else []


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _reference(conversation: Conversation) -> str:
    return text_of(conversation["messages"][-1]["content"])


def _check_reference(content: Any) -> None:
    """Raise ValueError if replies cannot be evaluated by this reference."""
    reference = text_of(content)
    if not reference.strip() and not isinstance(content, str):  # "" is an empty reply
        raise ValueError("the last message has no text to judge replies by")
    if has_answer(reference) and last_answer(reference) is None:
        answer = reference[reference.rindex("####") :]
        raise ValueError(
            f"the answer {answer[:40]!r} is not a number: write it as in '#### 1,234.5'"
        )


def _conversation(value: Any) -> Conversation:
    """The conversation of one record, in the format determined by its keys. Raises ValueError."""
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise ValueError(f"expected an object or an array of messages, got {type(value).__name__}")
    for key, read in LAYOUTS.items():
        if value.get(key) is not None:
            return read(value)
    raise ValueError(
        f"no {', '.join(map(repr, LAYOUTS))} in it, only "
        f"{', '.join(map(repr, value))[:80] or 'nothing'}"
    )


def _chat(messages: Any, value: dict[str, Any]) -> Conversation:
    """A conversation to train on, with the system message from `value["system"]`, if any."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError("expected an array of at least 2 messages")
    messages = [
        _plain_message(message) if isinstance(message, dict) else message for message in messages
    ]
    if value.get("system"):
        messages = [{"role": "system", "content": value["system"]}, *messages]
    if turns_of(messages)[-1][0] != "assistant":
        raise ValueError(f"message {len(messages) - 1}: the last message must be the assistant's")
    return {"messages": messages}


SHAREGPT_ROLES = dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant") | {"human": "user"}


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message with `role` and `content`, from ShareGPT's `from` and `value`."""
    if "role" in message or "from" not in message:
        return message
    role = message["from"]
    return {
        "role": SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role,
        "content": message.get("value"),
    }


def _alpaca(value: dict[str, Any]) -> Conversation:
    more, history = value.get("input") or "", value.get("history") or []
    texts = [value["instruction"], more, value.get("output")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("instruction, input and output must be strings")
    pairs = isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 for turn in history
    )
    if not pairs:
        raise ValueError("history must be an array of pairs, an instruction and its output")
    turns = [*history, [texts[0] + (f"\n\n{more}" if more else ""), texts[2]]]
    return _chat(
        [message for asked, reply in turns for message in (user(asked), assistant(reply))], value
    )


def _question(value: dict[str, Any]) -> Conversation:
    if missing := [name for name in ("question", "choices", "answer") if name not in value]:
        raise ValueError(f"no {missing[0]!r}")
    question, choices, answer = value["question"], value["choices"], value["answer"]
    strings = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not isinstance(question, str) or not strings:
        raise ValueError("question must be a string and choices an array of strings")
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise ValueError(f"{len(choices)} choices: expected 2 to {len(string.ascii_uppercase)}")
    letters = list(string.ascii_uppercase[: len(choices)])
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = letters[answer]
    elif choices.count(answer) == 1:
        letter = letters[choices.index(answer)]
        if answer in letters and answer != letter:
            raise ValueError(
                f"the answer {answer!r} is both a letter and the text of another choice: give the "
                "index"
            )
        answer = letter
    elif answer not in letters:
        raise ValueError(
            f"the answer {answer!r} is no index, letter or text of the {len(choices)} choices"
        )
    return multiple_choice(question, choices, letters, answer)


# Key -> reader of records with this key, in order of precedence.
LAYOUTS: dict[str, Callable[[dict[str, Any]], Conversation]] = {
    "messages": lambda value: _chat(value["messages"], value),
    "conversations": lambda value: _chat(value["conversations"], value),
    "conversation": lambda value: _chat(value["conversation"], value),
    "instruction": _alpaca,
    "choices": _question,
}

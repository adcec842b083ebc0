"""Conversations of one's own: a JSON Lines file with an array of messages a line."""

import json
from pathlib import Path

from nanochat_jax.cli import NotFound, UsageError
from nanochat_jax.tasks.base import Conversation, Task


class CustomJSON(Task):
    """Each line is `[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]`.

    Blank lines are skipped. A missing file or a line of another form is an error that names it.
    """

    def __init__(self, path: Path, **view: int) -> None:
        super().__init__(**view)
        self.path = Path(path)
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError as error:
            raise NotFound(f"no conversations in {self.path}: the file does not exist") from error
        self.conversations = [self._parse(line, number) for number, line in enumerate(lines, 1) if line.strip()]
        if not self.conversations:
            raise UsageError(f"{self.path} holds no conversation")

    def _parse(self, line: str, number: int) -> list[dict[str, str]]:
        try:
            messages = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{self.path} line {number} is not JSON: {error}") from error
        if not isinstance(messages, list) or len(messages) < 2:
            raise UsageError(f"{self.path} line {number}: expected an array of at least 2 messages")
        for i, message in enumerate(messages):
            role = ("user", "assistant")[i % 2]
            fields = message if isinstance(message, dict) else {}
            if fields.get("role") != role or not isinstance(fields.get("content"), str):
                problem = f"message {i} needs the role {role!r} and a string as content"
                raise UsageError(f"{self.path} line {number}: {problem}")
        return messages

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        return {"messages": self.conversations[index]}

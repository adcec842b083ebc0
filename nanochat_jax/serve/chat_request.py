"""A chat request: its types, its limits, and the prompt made of it.

    {"messages": [{"role": "user", "content": "2+2?"}], "temperature": 0.8, "max_tokens": 512, "top_k": 50}

The assistant's content may also be a list of parts, as in `nanochat_jax.chat`, so that its tool calls keep their
tokens: `[{"type": "python", "text": "2+2"}, {"type": "python_output", "text": "4"}, {"type": "text", "text": "4."}]`.
Whatever is in a text is ordinary text: control tokens come from the structure alone, never from what a client wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_jax.chat import PARTS
from nanochat_jax.tokenizer import Tokenizer

MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8000
MAX_TOTAL_CHARS = 32000
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 200
MAX_REPLY_TOKENS = 4096
MAX_DETAIL_CHARS = 300
ROLES = ("user", "assistant")


class BadRequest(Exception):
    """A request that is not served: 422 for a wrong type, 400 for what is over a limit, 503 for a busy server.

    `param` is the field that is wrong and `code` the kind of mistake, for clients that look at them.
    """

    def __init__(self, status: int, detail: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail if len(detail) <= MAX_DETAIL_CHARS else detail[: MAX_DETAIL_CHARS - 3] + "..."
        self.param = param
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a reply is drawn; a server's defaults, or those with a request's own values in their place."""

    temperature: float = 0.8
    top_k: int = 50  # 0 keeps all tokens
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature must be from 0 to {MAX_TEMPERATURE:g}, got {self.temperature}")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"top_k must be from 0 (all tokens) to {MAX_TOP_K}, got {self.top_k}")
        if not 1 <= self.max_tokens <= MAX_REPLY_TOKENS:
            raise ValueError(f"max_tokens must be from 1 to {MAX_REPLY_TOKENS}, got {self.max_tokens}")


@dataclass(frozen=True, kw_only=True)
class Message:
    role: str
    parts: tuple[tuple[str, str], ...]  # (type, text)

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.parts)


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    messages: tuple[Message, ...]
    sampling: Sampling


def parse(body: Any, defaults: Sampling) -> ChatRequest:
    """Check a decoded JSON body; fields that are absent or null take the default, unknown ones are ignored.

    Raises `BadRequest` (422) if a type is wrong, else (400) if a value is.
    """
    if not isinstance(body, dict):
        raise BadRequest(422, f"the body must be an object, not {type_name(body)}")
    listed = body.get("messages")
    if not isinstance(listed, list):
        raise BadRequest(422, f"messages must be a list, not {type_name(listed)}")
    messages = tuple(_message(index, message) for index, message in enumerate(listed))
    given = {name: checked_number(name, body.get(name), kind) for name, kind in
             (("temperature", float), ("top_k", int), ("max_tokens", int))}
    _check_limits(messages)
    try:
        values = vars(defaults) | {name: value for name, value in given.items() if value is not None}
        return ChatRequest(messages=messages, sampling=Sampling(**values))
    except ValueError as error:
        raise BadRequest(400, str(error)) from error


def make_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], *, max_len: int, max_tokens: int, drop: bool = True
) -> tuple[tuple[int, ...], int]:
    """Prompt of a conversation, and how many of its first messages were left out to make it fit in `max_len` tokens.

    Messages are dropped from the start, up to one of the user's, until the prompt leaves room for `max_tokens` or, if
    that is more, for a quarter of the context. The last message is never dropped: if it alone fills the context,
    `BadRequest` (400) is raised; and without `drop`, if all of them do.
    """
    def special(name: str) -> int:
        return tokenizer.encode_special(f"<|{name}|>")

    def encode(message: Message) -> list[int]:
        ids = [special(f"{message.role}_start")]
        for kind, text in message.parts:
            start, end, _ = PARTS[kind]
            ids += tokenizer.encode(text, prepend=start, append=end)
        return [*ids, special(f"{message.role}_end")]

    encoded = [encode(message) for message in messages]
    first, last = 0, len(messages) - 1
    length = 2 + sum(map(len, encoded))  # bos and assistant_start
    room = min(max_tokens, max_len // 4)
    while drop and length + room > max_len and first < last:
        length -= len(encoded[first])
        first += 1
        while first < last and messages[first].role != "user":
            length -= len(encoded[first])
            first += 1
    if length >= max_len:
        what = "last message makes" if drop else "messages make"
        raise BadRequest(400, f"the {what} a prompt of {length} tokens; the model's context is {max_len}, its reply "
                              "included: send less", param="messages", code="context_length_exceeded")
    ids = [token for message in encoded[first:] for token in message]
    return (special("bos"), *ids, special("assistant_start")), first


def _message(index: int, message: Any) -> Message:
    where = f"messages.{index}"
    if not isinstance(message, dict):
        raise BadRequest(422, f"{where} must be an object, not {type_name(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise BadRequest(422, f"{where}.role must be a string, not {type_name(role)}")
    if isinstance(content, str):
        return Message(role=role, parts=(("text", content),))
    if role != "assistant" or not isinstance(content, list):
        raise BadRequest(422, f"{where}.content must be a string, not {type_name(content)}")
    parts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not (isinstance(kind, str) and kind in PARTS and isinstance(part.get("text"), str)):
            raise BadRequest(422, f"{where}.content.{place} must be a part with a type ({', '.join(PARTS)}) and a text")
        parts.append((kind, part["text"]))
    return Message(role=role, parts=tuple(parts))


def checked_number(name: str, value: Any, kind: type[int] | type[float]) -> float | int | None:
    """The value, a number of this kind or None; raises `BadRequest` (422) if it is not.

    A boolean is no number; 2.0 is an integer, as in JSON Schema.
    """
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or (isinstance(value, kind | int) and not isinstance(value, bool)):
        return value
    wanted = "an integer" if kind is int else "a number"
    raise BadRequest(422, f"{name} must be {wanted}, not {type_name(value)}", param=name)


def _check_limits(messages: Sequence[Message]) -> None:
    if not messages:
        raise BadRequest(400, "there must be at least one message")
    if len(messages) > MAX_MESSAGES:
        raise BadRequest(400, f"at most {MAX_MESSAGES} messages are allowed, got {len(messages)}")
    total = 0
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise BadRequest(400, f"messages.{index}.role must be user or assistant, got {message.role[:50]!r}")
        if not message.text:
            raise BadRequest(400, f"messages.{index}.content is empty")
        if len(message.text) > MAX_MESSAGE_CHARS:
            raise BadRequest(400, f"messages.{index}.content has {len(message.text)} characters; "
                                  f"at most {MAX_MESSAGE_CHARS} are allowed")
        total += len(message.text)
    if total > MAX_TOTAL_CHARS:
        raise BadRequest(400, f"the conversation has {total} characters; at most {MAX_TOTAL_CHARS} are allowed")


def type_name(value: Any) -> str:
    """What JSON calls the type of a decoded value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")

"""The page's chat request: its types and limits, and how messages become a prompt.

    {"messages": [{"role": "user", "content": "2+2?"}], "temperature": 0.8, "max_tokens": 512,
     "top_k": 50}

An assistant's content may also be a list of parts, as in `nanochat_jax.conversation`, so that its
tool calls keep their tokens: `[{"type": "python", "text": "2+2"}, {"type": "python_output",
"text": "4"}, {"type": "text", "text": "4."}]`. Text from a client never becomes a control token;
these come only from the structure.

openapi.py describes the models below. A body with other fields is for OpenAI's API (`for_page`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from nanochat_jax.conversation import render_message
from nanochat_jax.infer.request import Sampling
from nanochat_jax.tokenizer import Tokenizer, without_surrogates

MAX_MESSAGES = 500
MAX_PARTS = 1000  # of a message
# of a user's message; only the total limits a reply, so that it can be sent back
MAX_MESSAGE_CHARS = 8000
MAX_TOTAL_CHARS = 32000
MAX_TOKENS = 4096  # of a reply
MAX_TOP_K = 200
MAX_TEMPERATURE = 2.0
MAX_DETAIL_CHARS = 300
# pydantic's names of errors of a value; all others are errors of a type
VALUE_ERRORS = {
    "greater_than",
    "greater_than_equal",
    "less_than_equal",
    "finite_number",
    "too_short",
    "too_long",
    "string_too_short",
    "string_too_long",
    "value_error",
}
# tags of unions in pydantic's error locations, which are not names of fields
TAGS = {"user", "assistant", "system", "developer", "tool", "str", "list"}


class BadRequest(Exception):
    """A refused request.

    Attributes:
        status: 422 for a wrong type, 400 for a wrong value, 503 if the server is busy, and so on.
        param: the wrong field.
        code: the type of error, for programs.
    """

    def __init__(
        self, status: int, detail: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.param, self.code = status, param, code
        if len(detail) > MAX_DETAIL_CHARS:
            detail = detail[: MAX_DETAIL_CHARS - 3] + "..."
        self.detail = detail


class Strict(BaseModel):
    """Types as in JSON: true is not a number, "1" is not a number, 2.0 is an integer."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


Whole = BeforeValidator(
    lambda value: int(value) if isinstance(value, float) and value.is_integer() else value
)
Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)]
TopK = Annotated[int, Field(ge=0, le=MAX_TOP_K), Whole]
MaxTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS), Whole]
Unicode = BeforeValidator(lambda text: without_surrogates(text) if isinstance(text, str) else text)
Text = Annotated[str, Field(min_length=1, max_length=MAX_MESSAGE_CHARS), Unicode]
ReplyText = Annotated[str, Field(min_length=1, max_length=MAX_TOTAL_CHARS), Unicode]
# End of a prompt: the start of a reply ("reply"), an open last message ("continue"), or neither.
Ending = Literal["reply", "continue", "none"]
text_or_parts = Discriminator(lambda content: "list" if isinstance(content, list) else "str")


class SamplingFields(Strict):
    """Fields of a request that override the server's sampling; None leaves the default."""

    SAMPLING: ClassVar[tuple[str, ...]] = ("temperature", "top_k", "max_tokens")

    temperature: Temperature | None = None
    top_k: TopK | None = None
    max_tokens: MaxTokens | None = None

    def sampling(self, defaults: Sampling) -> Sampling:
        given = {name: getattr(self, name) for name in self.SAMPLING}
        return dataclasses.replace(
            defaults, **{name: value for name, value in given.items() if value is not None}
        )


class Part(Strict):
    type: Literal["text", "python", "python_output"]
    text: ReplyText


class UserMessage(Strict):
    role: Literal["user"]
    content: Text


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Annotated[
        Annotated[ReplyText, Tag("str")]
        | Annotated[
            list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("list")
        ],
        text_or_parts,
    ]


class ChatRequest(SamplingFields):
    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"type": "null"}})

    messages: Annotated[
        list[Annotated[UserMessage | AssistantMessage, Field(discriminator="role")]],
        # fail_fast: otherwise a body could have very many errors
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    ]

    @model_validator(mode="after")
    def _within_limits(self) -> "ChatRequest":
        texts = [
            text
            for message in self.messages
            for text in (
                [message.content]
                if isinstance(message.content, str)
                else [part.text for part in message.content]
            )
        ]
        if (length := sum(map(len, texts))) > MAX_TOTAL_CHARS:
            raise ValueError(
                f"the conversation has {length} characters; the limit is {MAX_TOTAL_CHARS}"
            )
        return self


def for_page(body: Any) -> bool:
    """Whether a body is in the page's protocol: all its fields are `ChatRequest`'s or null.

    OpenAI's clients post to the same path if their base URL lacks /v1. They always send `model`.
    """
    return not isinstance(body, dict) or all(
        value is None or name in ChatRequest.model_fields for name, value in body.items()
    )


M = TypeVar("M", bound=BaseModel)


def check(model: type[M], body: Any) -> M:
    """Return a decoded JSON body as `model`. Raises `BadRequest` for its first error."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _bad_request(error.errors(include_url=False)[0]) from None


def _bad_request(error: Mapping[str, Any]) -> BadRequest:
    """An error of pydantic's: 422 for a wrong type, 400 for a wrong value."""
    name, value, location = error["type"], error["input"], error["loc"]
    steps = [str(step) for at, step in enumerate(location) if at == 0 or step not in TAGS]
    field = ".".join(steps)
    if name == "extra_forbidden":
        field = field[:80]
        detail = f"{field} is not supported by this server; leave it out"
        return BadRequest(400, detail, param=field, code="unsupported_parameter")
    if name in ("literal_error", "union_tag_invalid"):
        chosen = value if name == "literal_error" else value.get("role")
        is_value_error = isinstance(chosen, str)
    else:
        is_value_error = name in VALUE_ERRORS
    if name == "value_error":
        detail = str(error["ctx"]["error"])
    elif name in ("model_type", "model_attributes_type"):
        detail = f"{field or 'the body'}: Input should be an object"
    else:
        detail = f"{field or 'the body'}: {error['msg']}"
    if isinstance(value, int | float) or isinstance(value, str) and len(value) < 50:
        detail += f", got {value!r}"
    return BadRequest(400 if is_value_error else 422, detail, param=field or None)


def make_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    *,
    max_len: int,
    max_tokens: int,
    drop: bool = True,
    ending: Ending = "reply",
) -> tuple[tuple[int, ...], int]:
    """Return a conversation's prompt, and how many of its first messages were dropped.

    With `drop`, messages are dropped from the start, up to one of the user's, until a context of
    `max_len` tokens has room for `max_tokens` more, or for a quarter of the context if that is
    less. The last message is never dropped.

    Raises `BadRequest` (400) if the rest does not fit the context.
    """
    encoded = [
        render_message(tokenizer, message["role"], message["content"])[0] for message in messages
    ]
    tail = (tokenizer.encode_special("<|assistant_start|>"),) if ending == "reply" else ()
    if ending == "continue":
        encoded[-1].pop()  # the token that ends the message
    first, last = 0, len(messages) - 1
    length = 1 + len(tail) + sum(map(len, encoded))  # 1 is bos
    room = min(max_tokens, max_len // 4)
    while drop and length + room > max_len and first < last:
        length -= len(encoded[first])
        first += 1
        while first < last and messages[first]["role"] != "user":
            length -= len(encoded[first])
            first += 1
    if length >= max_len:
        what = "last message makes" if drop else "messages make"
        raise BadRequest(
            400,
            f"the {what} a prompt of {length} tokens; the model's context is {max_len}, its reply "
            "included: send less",
            param="messages",
            code="context_length_exceeded",
        )
    ids = [token for message in encoded[first:] for token in message]
    return (tokenizer.bos_id, *ids, *tail), first

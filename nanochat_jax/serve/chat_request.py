"""A chat request: its types, its limits, and the prompt made of it.

    {"messages": [{"role": "user", "content": "2+2?"}], "temperature": 0.8, "max_tokens": 512,
    "top_k": 50}

The assistant's content may also be a list of parts, as in `nanochat_jax.conversation`, so that its
tool calls keep their tokens: `[{"type": "python", "text": "2+2"}, {"type": "python_output",
"text": "4"}, {"type": "text", "text": "4."}]`. Whatever is in a text is ordinary text: control
tokens come from the structure alone, never from what a client wrote.

The models below check requests, and openapi.py describes them. A body with other fields is for
OpenAI's API (`for_page`).
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

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
from nanochat_jax.tokenizer import Tokenizer, without_surrogates

MAX_MESSAGES = 500
MAX_PARTS = 1000  # of a message
# of what a user wrote; a reply is limited by the total alone, or it could not be sent back
MAX_MESSAGE_CHARS = 8000
MAX_TOTAL_CHARS = 32000
MAX_TOKENS = 4096  # of a reply
MAX_DETAIL_CHARS = 300
# Mistakes of a value, by pydantic's names; all others are of a type.
LIMITS = {
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
# Tags of unions in pydantic's error locations; they are not names of fields.
TAGS = {"user", "assistant", "system", "developer", "tool", "str", "list"}


class BadRequest(Exception):
    """A request that is not served: 422 for a wrong type, 400 for what is over a limit, 503 for a
    busy server.

    `param` is the field that is wrong and `code` the kind of mistake, for clients that look at
    them.
    """

    def __init__(
        self, status: int, detail: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = (
            detail if len(detail) <= MAX_DETAIL_CHARS else detail[: MAX_DETAIL_CHARS - 3] + "..."
        )
        self.param = param
        self.code = code


class Strict(BaseModel):
    """As JSON has it: a boolean is no number, a number no string; 2.0 is an integer."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


Whole = BeforeValidator(
    lambda value: int(value) if isinstance(value, float) and value.is_integer() else value
)
Temperature = Annotated[float, Field(ge=0, le=2)]
TopK = Annotated[int, Field(ge=0, le=200), Whole]
MaxTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS), Whole]
Unicode = BeforeValidator(lambda text: without_surrogates(text) if isinstance(text, str) else text)
Text = Annotated[str, Field(min_length=1, max_length=MAX_MESSAGE_CHARS), Unicode]
ReplyText = Annotated[str, Field(min_length=1, max_length=MAX_TOTAL_CHARS), Unicode]
# End of a prompt: the start of a reply ("reply"), an open last message ("continue"), or neither.
Ending = Literal["reply", "continue", "none"]
text_or_parts = Discriminator(lambda content: "list" if isinstance(content, list) else "str")


class Sampling(Strict):
    """How a reply is drawn; a server's defaults, or those with a request's own values in their
    place.
    """

    temperature: Temperature = 0.8
    top_k: TopK = 50  # 0 keeps all tokens
    max_tokens: MaxTokens = 512


class Asked(Strict):
    """What a client may say of the reply; None is left to the server."""

    temperature: Temperature | None = None
    top_k: TopK | None = None
    max_tokens: MaxTokens | None = None

    def sampling(self, defaults: Sampling) -> Sampling:
        given = {name: getattr(self, name) for name in Sampling.model_fields}
        return defaults.model_copy(
            update={name: value for name, value in given.items() if value is not None}
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


class ChatRequest(Asked):
    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"type": "null"}})

    messages: Annotated[
        list[Annotated[UserMessage | AssistantMessage, Field(discriminator="role")]],
        # or a body could hold many errors
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    ]

    @model_validator(mode="after")
    def _within_limits(self) -> "ChatRequest":
        lengths = [
            len(content)
            if isinstance(content := message.content, str)
            else sum(len(part.text) for part in content)
            for message in self.messages
        ]
        if sum(lengths) > MAX_TOTAL_CHARS:
            raise ValueError(
                f"the conversation has {sum(lengths)} characters; at most {MAX_TOTAL_CHARS} are "
                "allowed"
            )
        return self


def for_page(body: Any) -> bool:
    """Whether a body is in the page's protocol, upstream's: all its fields are `ChatRequest`'s or
    null.

    OpenAI's clients post to the same path if their base URL lacks /v1. They always send `model`.
    """
    return not isinstance(body, dict) or all(
        value is None or name in ChatRequest.model_fields for name, value in body.items()
    )


M = TypeVar("M", bound=BaseModel)


def check(model: type[M], body: Any) -> M:
    """A decoded JSON body as `model`. Raises `BadRequest`: 422 if a type is wrong, else 400 if a
    value is.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
    steps = [str(step) for index, step in enumerate(found["loc"]) if index == 0 or step not in TAGS]
    value, where = found["input"], ".".join(steps)
    if found["type"] == "extra_forbidden":
        name = where[:80]
        raise BadRequest(
            400,
            f"{name} is not supported by this server; leave it out",
            param=name,
            code="unsupported_parameter",
        )
    chosen = value.get("role") if found["type"] == "union_tag_invalid" else value
    known = (
        isinstance(chosen, str)
        if found["type"] in ("literal_error", "union_tag_invalid")
        else found["type"] in LIMITS
    )
    not_object = found["type"] in ("model_type", "model_attributes_type")
    message = "Input should be an object" if not_object else found["msg"]
    text = (
        str(found["ctx"]["error"])
        if found["type"] == "value_error"
        else f"{where or 'the body'}: {message}"
    )
    shown = (
        f", got {value!r}"
        if isinstance(value, int | float) or isinstance(value, str) and len(value) < 50
        else ""
    )
    raise BadRequest(400 if known else 422, text + shown, param=where or None)


def make_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    *,
    max_len: int,
    max_tokens: int,
    drop: bool = True,
    ending: Ending = "reply",
) -> tuple[tuple[int, ...], int]:
    """Prompt of a conversation, and how many of its first messages were left out to make it fit in
    `max_len` tokens.

    Messages are dropped from the start, up to one of the user's, until the prompt leaves room for
    `max_tokens` or, if that is more, for a quarter of the context. The last message is never
    dropped: if it alone fills the context, `BadRequest` (400) is raised; and without `drop`, if
    all of them do.
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

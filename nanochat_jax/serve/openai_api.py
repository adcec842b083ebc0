"""OpenAI's chat API: POST /v1/chat/completions and GET /v1/models, also without /v1.

An unsupported field is refused, never ignored, unless its value cannot change the reply: null, a
default such as `presence_penalty: 0`, or any value of a field such as `user`. Defaults are the
server's, including top-k, which a request may set as `top_k`. A conversation that does not fit the
context is refused: an API does not drop messages. The reply's text excludes calculations; the usage
includes them.

If the last message is the assistant's, the reply continues it. `add_generation_prompt: true` or
`continue_final_message: false` starts another message instead. Earlier tool calls and their results
are rendered as the model's calculations.

Reference: https://platform.openai.com/docs/api-reference/chat
"""

import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from aiohttp import web
from pydantic import BeforeValidator, ConfigDict, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from nanochat_jax.infer.request import Request, Result
from nanochat_jax.serve.access import OPENAI, error_body, read_json
from nanochat_jax.serve.chat_request import (
    MAX_MESSAGE_CHARS,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOKENS,
    MAX_TOTAL_CHARS,
    Asked,
    BadRequest,
    Ending,
    MaxTokens,
    Sampling,
    Strict,
    TopK,
    Whole,
    check,
    make_prompt,
    text_or_parts,
)
from nanochat_jax.serve.replies import Event, EventStream, Replies, ReplyError, encode
from nanochat_jax.tokenizer import Tokenizer

MAX_CHOICES = 8  # replies to one request
REPLY_ERROR_STATUS = {"timeout": 504, "shutdown": 503, "failed": 500}


def _unicode(value: Any) -> Any:
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError as error:
        message = "Input should not have a lone surrogate"
        raise PydanticCustomError("surrogate", message) from error
    return value


Unicode = BeforeValidator(_unicode)
Text = Annotated[str, Field(max_length=MAX_TOTAL_CHARS), Unicode]
Stop = Annotated[str, Field(min_length=1, max_length=200), Unicode]
Stops = Annotated[list[Stop], Field(max_length=4)]
# -1 is what other servers take for "no limit": here the most that is allowed, or all of the tokens.
AsMany = Annotated[
    MaxTokens,
    BeforeValidator(
        lambda value: MAX_TOKENS if value == -1 else value,
        json_schema_input_type=Literal[-1] | MaxTokens,
    ),
]
AnyTopK = Annotated[
    TopK,
    BeforeValidator(
        lambda value: 0 if value == -1 else value, json_schema_input_type=Literal[-1] | TopK
    ),
]


class Known(Strict):
    """An object that refuses unknown fields. Null means absent.

    `NEUTRAL` names fields that have no effect, with the values that are accepted; None accepts any.
    """

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...] | None]] = {}
    model_config = ConfigDict(
        extra="forbid", json_schema_extra=lambda schema, model: _describe_neutral(schema, model)
    )

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known: dict[str, Any] = {}
        unknown: dict[str, Any] = {}
        for name, value in data.items():
            if value is None or _is_neutral(value, cls.NEUTRAL.get(name, ())):
                continue
            if name in cls.model_fields:
                known[name] = value
            elif not unknown:  # one error is enough, however many fields a body has
                unknown[name] = value
        return known | unknown


def _is_neutral(value: Any, values: tuple[Any, ...] | None) -> bool:
    return values is None or any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in values
    )


def _describe_neutral(schema: dict[str, Any], model: Any) -> None:
    neutral = {
        name: {} if values is None else {"enum": [None, *values]}
        for name, values in model.NEUTRAL.items()
    }
    schema["properties"] = {**schema["properties"], **neutral}
    schema["additionalProperties"] = {"type": "null"}


class TextPart(Known):
    NEUTRAL = {"annotations": None, "cache_control": None}

    type: Literal["text"]
    text: Text


TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[Annotated[Text, Tag("str")] | Annotated[TextParts, Tag("list")], text_or_parts]


class Function(Known):
    name: Annotated[Text, Field(min_length=1, max_length=200)]
    arguments: Annotated[Text, Field(max_length=MAX_MESSAGE_CHARS)]


class Call(Known):
    NEUTRAL = {"id": None, "index": None}

    type: Literal["function"]
    function: Function


class Message(Known):
    NEUTRAL = {"name": None, "tool_call_id": None}

    role: Literal["system", "developer", "user", "tool"]
    content: Content

    def parts(self) -> list[dict[str, str]]:
        """The message as conversation.py's parts. A tool's result is rendered like the
        calculator's.
        """
        part_type = "python_output" if self.role == "tool" else "text"
        return [{"type": part_type, "text": _text(self.content)}]


class AssistantMessage(Known):
    NEUTRAL = {"name": None, "annotations": None, "reasoning": None, "reasoning_content": None}

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[Call], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None

    def parts(self) -> list[dict[str, str]]:
        """The message as conversation.py's parts. A tool call is rendered like a call of the
        calculator.
        """
        text = _text(self.content or "")
        calls = [call.function for call in self.tool_calls or ()]
        return [
            *([{"type": "text", "text": text}] if text else []),
            *({"type": "python", "text": f"{call.name}({call.arguments})"} for call in calls),
        ]


def _ends_with_result(turn: Mapping[str, Any]) -> bool:
    return any(part["type"] == "python_output" for part in turn["content"][-1:])


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class StreamOptions(Known):
    NEUTRAL = {"include_obfuscation": None, "continuous_usage_stats": (False,)}

    include_usage: bool | None = None


class CompletionRequest(Asked, Known):
    NEUTRAL = {
        **dict.fromkeys(
            (
                "cache_prompt",
                "metadata",
                "parallel_tool_calls",
                "prediction",
                "priority",
                "prompt_cache_key",
                "prompt_cache_retention",
                "request_id",
                "safety_identifier",
                "service_tier",
                "store",
                "user",
            )
        ),
        "bad_words": ([],),
        "best_of": (1,),
        "chat_template_kwargs": ({},),
        "echo": (False,),
        "frequency_penalty": (0,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "ignore_eos": (False,),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "logit_bias": ({},),
        "logprobs": (False,),
        "min_p": (0,),
        "min_tokens": (0,),
        "modalities": (["text"],),
        "presence_penalty": (0,),
        "reasoning_effort": ("none",),
        "repetition_penalty": (1,),
        "response_format": ({"type": "text"},),
        "skip_special_tokens": (True,),
        "stop_token_ids": ([],),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "typical_p": (1,),
        "use_beam_search": (False,),
        "verbosity": ("medium",),
    }

    model: str | None = None
    messages: Annotated[
        list[Annotated[Message | AssistantMessage, Field(discriminator="role")]],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    ]
    max_tokens: AsMany | None = None
    max_completion_tokens: AsMany | None = None  # the newer name of max_tokens
    top_k: AnyTopK | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Whole] | None = None
    stop: (
        Annotated[
            Stops,
            BeforeValidator(
                lambda stop: [stop] if isinstance(stop, str) else stop,
                json_schema_input_type=Stop | Stops,
            ),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """The turns as conversation.py renders them.

        A system message is merged into the next user message, as in training. Tool results and the
        assistant's text after them belong to the turn that called the tool.
        """
        messages = [(message.role, message.parts()) for message in self.messages]
        length = sum(len(part["text"]) for _, parts in messages for part in parts)
        if length > MAX_TOTAL_CHARS:
            detail = f"the conversation has {length} characters; the limit is {MAX_TOTAL_CHARS}"
            raise BadRequest(400, detail, param="messages", code="context_length_exceeded")
        turns: list[dict[str, Any]] = []
        system: list[str] = []
        for role, parts in messages:
            last = turns[-1] if turns and turns[-1]["role"] == "assistant" else None
            if role in ("system", "developer"):
                system.append(parts[0]["text"])
            elif role == "user":
                turns.append({"role": "user", "content": "\n\n".join([*system, parts[0]["text"]])})
                system = []
            elif last is not None and (role == "tool" or _ends_with_result(last)):
                last["content"] += parts
            else:
                turns.append({"role": "assistant", "content": parts})
        return [*turns, {"role": "user", "content": "\n\n".join(system)}] if system else turns

    def ending(self, last_role: str) -> Ending:
        """How the prompt ends. By default, an assistant's last message is continued."""
        continues = self.continue_final_message
        if continues is None:
            continues = last_role == "assistant" and not self.add_generation_prompt
        if continues:
            return "continue"
        return "none" if self.add_generation_prompt is False else "reply"

    def requests(self, prompt: tuple[int, ...], sampling: Sampling) -> list[Request]:
        seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        return [
            Request(
                prompt,
                **sampling.model_dump(),
                top_p=self.top_p or 1.0,
                seed=(seed + index) % 2**64,
                stop=tuple(self.stop or ()),
            )
            for index in range(self.n or 1)
        ]


def parse(body: Any, model: str) -> CompletionRequest:
    """Check a decoded JSON body. Raises `BadRequest`: 404 for another model, 400 or 422 for what
    is wrong.
    """
    asked = check(CompletionRequest, body)
    if asked.add_generation_prompt and asked.continue_final_message:
        detail = "continue_final_message and add_generation_prompt cannot both be true"
        raise BadRequest(400, detail, param="continue_final_message")
    _check_model(model if asked.model is None else asked.model, model)
    return asked


@dataclass(frozen=True, kw_only=True)
class OpenAIServer:
    """The handlers of /v1. `model` is the id that clients ask for."""

    replies: Replies
    tokenizer: Tokenizer
    model: str
    max_len: int
    defaults: Sampling
    created: int = field(default_factory=lambda: int(time.time()))

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochat_jax",
            "max_model_len": self.max_len,
        }

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card()]})

    async def show_model(self, request: web.Request) -> web.Response:
        _check_model(request.match_info["model"], self.model)
        return web.json_response(self._card())

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self.reply(request, await read_json(request))

    async def reply(self, request: web.Request, body: Any) -> web.StreamResponse:
        """Answer a request for chat completions whose body has been decoded."""
        request[OPENAI] = True
        asked = parse(body, self.model)
        sampling = asked.sampling(self.defaults)
        if asked.max_completion_tokens is not None:
            sampling = sampling.model_copy(update={"max_tokens": asked.max_completion_tokens})
        turns = asked.conversation()
        ending = asked.ending(turns[-1]["role"])
        prompt, _ = make_prompt(
            self.tokenizer,
            turns,
            max_len=self.max_len,
            drop=False,
            max_tokens=sampling.max_tokens,
            ending=ending,
        )
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.model,
        }
        requests = asked.requests(prompt, sampling)
        async with self.replies.open(requests) as events:
            if asked.stream:
                usage = asked.stream_options is not None and bool(
                    asked.stream_options.include_usage
                )
                return await _stream(
                    request, head, events, choices=len(requests), include_usage=usage
                )
            results: dict[int, Result] = {}
            try:
                async for batch in events:
                    results |= {index: event for index, event in batch if isinstance(event, Result)}
            except ReplyError as error:
                raise BadRequest(
                    REPLY_ERROR_STATUS[error.code], error.detail, code=error.code
                ) from error
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": None,
                "finish_reason": result.finish_reason,
            }
            for index, result in sorted(results.items())
        ]
        return web.json_response(
            {
                "object": "chat.completion",
                **head,
                "choices": choices,
                "usage": _usage(results.values()),
            }
        )


async def _stream(
    request: web.Request,
    head: Mapping[str, Any],
    events: AsyncIterator[list[tuple[int, Event]]],
    *,
    choices: int,
    include_usage: bool,
) -> web.StreamResponse:
    usage = {"usage": None} if include_usage else {}
    results: list[Result] = []

    def chunk(index: int, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {"object": "chat.completion.chunk", **head, "choices": [choice], **usage}

    # What surrounds a piece of text in its chunk is the same for each, and is encoded once.
    around = [
        encode(chunk(index, {"content": ""})).split('"content": ""') for index in range(choices)
    ]

    async with EventStream(request) as stream:
        try:
            role = {"role": "assistant", "content": "", "refusal": None}
            await stream.send(*(chunk(index, role) for index in range(choices)))
            async for batch in events:
                chunks: list[Mapping[str, Any] | str] = []
                for index, event in batch:
                    if isinstance(event, str):
                        chunks.append(f'"content": {encode(event)}'.join(around[index]))
                    elif isinstance(event, Result):
                        results.append(event)
                        chunks.append(chunk(index, {}, event.finish_reason))
                if chunks:
                    await stream.send(*chunks)
            if include_usage:
                await stream.send(
                    {
                        "object": "chat.completion.chunk",
                        **head,
                        "choices": [],
                        "usage": _usage(results),
                    }
                )
            await stream.send("[DONE]")
        except ReplyError as error:
            await stream.send(
                error_body(REPLY_ERROR_STATUS[error.code], error.detail, code=error.code)
            )
    return stream.response


def _usage(results: Iterable[Result]) -> dict[str, int]:
    results = list(results)
    prompt, completion = results[0].prompt_tokens, sum(len(result.tokens) for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _check_model(asked: str, model: str) -> None:
    if asked != model:
        raise BadRequest(
            404,
            f"there is no model {asked[:80]!r} here: ask for {model!r}",
            param="model",
            code="model_not_found",
        )

"""OpenAI's chat API over the same scheduler: POST /v1/chat/completions and GET /v1/models.

What would change the reply and is not built in (tools, penalties, response formats, ...) is refused, never ignored;
other unknown fields are ignored. Defaults are the server's own, top-k included, which a request may set as `top_k`.
A conversation that does not fit the context is refused: an API does not drop what it was given. The reply's text is
what the model said; its calculations are part of the usage alone.

Reference: https://platform.openai.com/docs/api-reference/chat
"""

import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BeforeValidator, Field, Tag

from nanochat_jax.infer.request import Request, Result
from nanochat_jax.serve.access import error_body, read_json
from nanochat_jax.serve.chat_request import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOTAL_CHARS,
    Asked,
    BadRequest,
    MaxTokens,
    Sampling,
    Strict,
    Unicode,
    Whole,
    check,
    make_prompt,
    text_or_parts,
)
from nanochat_jax.serve.replies import Event, EventStream, Replies, ReplyError, encode
from nanochat_jax.tokenizer import Tokenizer

MAX_CHOICES = 8  # replies to one request
# Fields that would change the reply, and the values that leave it as it is.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (), "frequency_penalty": (0,), "function_call": ("none", "auto"), "functions": ([],), "logit_bias": ({},),
    "logprobs": (False,), "modalities": (["text"],), "presence_penalty": (0,), "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"), "tools": ([],), "top_logprobs": (0,), "web_search_options": (),
}  # fmt: skip
REPLY_ERROR_STATUS = {"timeout": 504, "shutdown": 503, "failed": 500}


Text = Annotated[str, Field(max_length=MAX_TOTAL_CHARS), Unicode]
Stop = Annotated[str, Field(min_length=1, max_length=200), Unicode]
Stops = Annotated[list[Stop], Field(max_length=4)]


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Annotated[Text, Tag("str")]
                       | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("list")],
                       text_or_parts]
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    include_usage: bool | None = None


class CompletionRequest(Asked):
    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: MaxTokens | None = None  # the newer name of max_tokens
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Whole] | None = None
    stop: Annotated[Stops, BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop,
                                           json_schema_input_type=Stop | Stops)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """What was said, a system message merged into what the user says next, as the model was trained."""
        if sum(len(message.text) for message in self.messages) > MAX_TOTAL_CHARS:
            raise BadRequest(400, f"the conversation has more than {MAX_TOTAL_CHARS} characters", param="messages",
                             code="context_length_exceeded")
        turns, system = [], []
        for message in self.messages:
            if message.role in ("system", "developer"):
                system.append(message.text)
            elif message.role == "user":
                turns.append({"role": "user", "content": "\n\n".join([*system, message.text])})
                system = []
            else:
                turns.append({"role": "assistant", "content": message.text})
        return [*turns, {"role": "user", "content": "\n\n".join(system)}] if system else turns

    def requests(self, prompt: tuple[int, ...], sampling: Sampling) -> list[Request]:
        seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        return [Request(prompt, **sampling.model_dump(), top_p=self.top_p or 1.0, seed=(seed + index) % 2**64,
                        stop=tuple(self.stop or ())) for index in range(self.n or 1)]


def parse(body: Any, model: str) -> CompletionRequest:
    """Check a decoded JSON body. Raises `BadRequest`: 404 for another model, 400 or 422 for what is wrong."""
    for name, harmless in UNSUPPORTED.items() if isinstance(body, dict) else ():
        if body.get(name) is not None and body[name] not in harmless:
            raise BadRequest(400, f"{name} is not supported by this server", param=name, code="unsupported_parameter")
    messages = body.get("messages") if isinstance(body, dict) else None
    if any(isinstance(each, dict) and each.get("tool_calls") for each in (messages if isinstance(messages, list) else ())):
        raise BadRequest(400, "tool_calls are not supported by this server", param="messages", code="unsupported_parameter")
    asked = check(CompletionRequest, body)
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
        return {"id": self.model, "object": "model", "created": self.created, "owned_by": "nanochat_jax",
                "max_model_len": self.max_len}

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card()]})

    async def show_model(self, request: web.Request) -> web.Response:
        _check_model(request.match_info["model"], self.model)
        return web.json_response(self._card())

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        asked = parse(await read_json(request), self.model)
        sampling = asked.sampling(self.defaults)
        if asked.max_completion_tokens is not None:
            sampling = sampling.model_copy(update={"max_tokens": asked.max_completion_tokens})
        prompt, _ = make_prompt(self.tokenizer, asked.conversation(), max_len=self.max_len, drop=False,
                                max_tokens=sampling.max_tokens)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.model}
        requests = asked.requests(prompt, sampling)
        async with self.replies.open(requests) as events:
            if asked.stream:
                usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
                return await _stream(request, head, events, choices=len(requests), include_usage=usage)
            results: dict[int, Result] = {}
            try:
                async for batch in events:
                    results |= {index: event for index, event in batch if isinstance(event, Result)}
            except ReplyError as error:
                raise BadRequest(REPLY_ERROR_STATUS[error.code], error.detail, code=error.code) from error
        choices = [{"index": index, "message": {"role": "assistant", "content": result.text, "refusal": None},
                    "logprobs": None, "finish_reason": result.finish_reason}
                   for index, result in sorted(results.items())]  # fmt: skip
        return web.json_response({"object": "chat.completion", **head, "choices": choices,
                                  "usage": _usage(results.values())})


async def _stream(request: web.Request, head: Mapping[str, Any], events: AsyncIterator[list[tuple[int, Event]]], *,
                  choices: int, include_usage: bool) -> web.StreamResponse:
    usage = {"usage": None} if include_usage else {}
    results: list[Result] = []

    def chunk(index: int, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {"object": "chat.completion.chunk", **head, "choices": [choice], **usage}

    # What surrounds a piece of text in its chunk is the same for each, and is encoded once.
    around = [encode(chunk(index, {"content": ""})).split('"content": ""') for index in range(choices)]

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
                await stream.send({"object": "chat.completion.chunk", **head, "choices": [], "usage": _usage(results)})
            await stream.send("[DONE]")
        except ReplyError as error:
            await stream.send(error_body(REPLY_ERROR_STATUS[error.code], error.detail, code=error.code))
    return stream.response


def _usage(results: Iterable[Result]) -> dict[str, int]:
    results = list(results)
    prompt, completion = results[0].prompt_tokens, sum(len(result.tokens) for result in results)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _check_model(asked: str, model: str) -> None:
    if asked != model:
        raise BadRequest(404, f"there is no model {asked[:80]!r} here: ask for {model!r}", param="model",
                         code="model_not_found")

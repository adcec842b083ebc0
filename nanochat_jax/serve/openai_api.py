"""OpenAI's chat API over the same scheduler: POST /v1/chat/completions and GET /v1/models.

What would change the reply and is not built in (tools, penalties, response formats, ...) is refused, never ignored;
other unknown fields are ignored. Defaults are the server's own, top-k included, which a request may set as `top_k`.
A conversation that does not fit the context is refused: an API does not drop what it was given. The reply's text is
what the model said; its calculations are part of the usage alone.

Reference: https://platform.openai.com/docs/api-reference/chat
"""

import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from nanochat_jax.infer.request import Request, Result
from nanochat_jax.serve.chat_request import (
    MAX_TOTAL_CHARS,
    BadRequest,
    Message,
    Sampling,
    checked_number,
    make_prompt,
    type_name,
)
from nanochat_jax.serve.replies import Event, EventStream, Replies, ReplyError, encode
from nanochat_jax.tokenizer import Tokenizer

MAX_STOPS = 4
MAX_STOP_CHARS = 200
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that would change the reply, and the values that leave it as it is.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (), "frequency_penalty": (0,), "function_call": ("none", "auto"), "functions": ([],), "logit_bias": ({},),
    "logprobs": (False,), "modalities": (["text"],), "presence_penalty": (0,), "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"), "tools": ([],), "top_logprobs": (0,), "web_search_options": (),
}  # fmt: skip
REPLY_ERROR_STATUS = {"timeout": 504, "shutdown": 503, "failed": 500}


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A checked request."""

    messages: tuple[Message, ...]
    sampling: Sampling
    top_p: float = 1.0
    n: int = 1
    seed: int
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False

    def requests(self, prompt: tuple[int, ...]) -> list[Request]:
        sampling = self.sampling
        return [Request(prompt, max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
                        top_p=self.top_p, seed=(self.seed + index) % 2**64, stop=self.stop) for index in range(self.n)]


def parse(body: Any, defaults: Sampling, *, model: str, max_choices: int) -> Completion:
    """Check a decoded JSON body. Raises `BadRequest`: 404 for another model, 400 or 422 for what is wrong."""
    if not isinstance(body, dict):
        raise BadRequest(422, f"the body must be an object, not {type_name(body)}")
    given = {name: value for name, value in body.items() if value is not None}
    _check_model(given.get("model", model), model)
    for name, harmless in UNSUPPORTED.items():
        if name in given and given[name] not in harmless:
            raise BadRequest(400, f"{name} is not supported by this server", param=name, code="unsupported_parameter")
    messages = _messages(given.get("messages"))
    numbers = {name: checked_number(name, given.get(name), kind) for name, kind in (
        ("temperature", float), ("top_p", float), ("top_k", int), ("n", int), ("seed", int),
        ("max_tokens", int), ("max_completion_tokens", int))}  # fmt: skip
    number: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    sampling = defaults
    for name in ("temperature", "top_k", "max_tokens", "max_completion_tokens"):  # the last is the newer name
        if name in number:
            try:
                sampling = replace(sampling, **{name.replace("completion_", ""): number[name]})
            except ValueError as error:
                raise BadRequest(400, str(error), param=name) from error
    top_p, n, seed = number.get("top_p", 1.0), number.get("n", 1), number.get("seed", secrets.randbelow(2**31))
    if not 0 < top_p <= 1:
        raise BadRequest(400, f"top_p must be over 0 and at most 1, got {top_p}", param="top_p")
    if not 1 <= n <= max_choices:
        raise BadRequest(400, f"n must be from 1 to {max_choices}, got {n}", param="n")
    if not -(2**63) <= seed < 2**63:
        raise BadRequest(400, f"seed must be an integer of 64 bits, got {seed}", param="seed")
    stream, options = given.get("stream", False), given.get("stream_options", {})
    if not isinstance(stream, bool):
        raise BadRequest(422, f"stream must be a boolean, not {type_name(stream)}", param="stream")
    if not isinstance(options, dict) or not isinstance(options.get("include_usage"), bool | None):
        raise BadRequest(422, "stream_options must be an object with a boolean include_usage", param="stream_options")
    return Completion(messages=messages, sampling=sampling, top_p=top_p, n=n, seed=seed, stream=stream,
                      stop=_stops(given.get("stop")), include_usage=bool(options.get("include_usage")))


def error_body(status: int, detail: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients know it."""
    kind = {401: "authentication_error", 404: "not_found_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": detail, "type": kind, "param": param, "code": code}}


class OpenAIServer:
    """The handlers of /v1. `model` is the id that clients ask for."""

    def __init__(self, replies: Replies, tokenizer: Tokenizer, *, model: str, max_len: int, max_choices: int,
                 defaults: Sampling) -> None:
        self._replies = replies
        self._tokenizer = tokenizer
        self._model = model
        self._max_len = max_len
        self._max_choices = max_choices
        self._defaults = defaults
        self._created = int(time.time())

    def _card(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "nanochat_jax",
                "max_model_len": self._max_len}

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: web.Request) -> web.Response:
        _check_model(request.match_info["model"], self._model)
        return web.json_response(self._card())

    async def chat_completions(self, request: web.Request, body: Any) -> web.StreamResponse:
        completion = parse(body, self._defaults, model=self._model, max_choices=self._max_choices)
        prompt, _ = make_prompt(self._tokenizer, completion.messages, max_len=self._max_len, drop=False,
                                max_tokens=completion.sampling.max_tokens)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self._model}
        async with self._replies.open(completion.requests(prompt)) as events:
            if completion.stream:
                return await _stream(request, completion, head, events)
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


async def _stream(request: web.Request, completion: Completion, head: Mapping[str, Any],
                  events: AsyncIterator[list[tuple[int, Event]]]) -> web.StreamResponse:
    usage = {"usage": None} if completion.include_usage else {}
    results: list[Result] = []

    def chunk(index: int, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {"object": "chat.completion.chunk", **head, "choices": [choice], **usage}

    # What surrounds a piece of text in its chunk is the same for each, and is encoded once.
    around = [encode(chunk(index, {"content": ""})).split('"content": ""') for index in range(completion.n)]

    async with EventStream(request) as stream:
        try:
            role = {"role": "assistant", "content": "", "refusal": None}
            await stream.send(*(chunk(index, role) for index in range(completion.n)))
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
            if completion.include_usage:
                await stream.send({"object": "chat.completion.chunk", **head, "choices": [], "usage": _usage(results)})
            await stream.send("[DONE]")
        except ReplyError as error:
            await stream.send(error_body(REPLY_ERROR_STATUS[error.code], error.detail, code=error.code))
    return stream.response


def _usage(results: Iterable[Result]) -> dict[str, int]:
    results = list(results)
    prompt, completion = results[0].prompt_tokens, sum(len(result.tokens) for result in results)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _check_model(asked: Any, model: str) -> None:
    if not isinstance(asked, str):
        raise BadRequest(422, f"model must be a string, not {type_name(asked)}", param="model")
    if asked != model:
        raise BadRequest(404, f"there is no model {asked[:80]!r} here: ask for {model!r}", param="model",
                         code="model_not_found")


def _messages(listed: Any) -> tuple[Message, ...]:
    """The conversation, with leading system messages merged into the user's first, as the model was trained."""
    if not isinstance(listed, list):
        raise BadRequest(422, f"messages must be a list, not {type_name(listed)}", param="messages")
    turns = [_turn(f"messages.{index}", message) for index, message in enumerate(listed)]
    if sum(len(text) for _, text in turns) > MAX_TOTAL_CHARS:
        raise BadRequest(400, f"the conversation has more than {MAX_TOTAL_CHARS} characters", param="messages",
                         code="context_length_exceeded")
    first = next((index for index, (role, _) in enumerate(turns) if role != "system"), len(turns))
    if any(role == "system" for role, _ in turns[first:]):
        raise BadRequest(400, "system messages must come before all others", param="messages")
    system, rest = [text for _, text in turns[:first]], turns[first:]
    if not rest:
        raise BadRequest(400, "messages must have one of the user's at least", param="messages")
    if system:
        if rest[0][0] != "user":
            raise BadRequest(400, "after system messages the user must speak first", param="messages")
        rest[0] = ("user", "\n\n".join([*system, rest[0][1]]))
    return tuple(Message(role=role, parts=(("text", text),)) for role, text in rest)


def _turn(where: str, message: Any) -> tuple[str, str]:
    """Role and text of one message, whose content is a string or a list of text parts."""
    if not isinstance(message, dict):
        raise BadRequest(422, f"{where} must be an object, not {type_name(message)}", param=where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role[:50]) if isinstance(role, str) else type_name(role)
        raise BadRequest(400, f"{where}.role must be one of {', '.join(ROLES)}, got {shown}", param=f"{where}.role")
    if message.get("tool_calls"):
        raise BadRequest(400, f"{where}.tool_calls is not supported by this server", param=f"{where}.tool_calls",
                         code="unsupported_parameter")
    if isinstance(content, str):
        return ROLES[role], content
    if not isinstance(content, list) or not content:
        raise BadRequest(422, f"{where}.content must be a string or a list of text parts, got {str(content)[:20]}",
                         param=f"{where}.content")
    for place, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise BadRequest(400, f"{where}.content.{place} must be a part of type text with a text: this model reads "
                                  "nothing else", param=f"{where}.content")
    return ROLES[role], "".join(part["text"] for part in content)


def _stops(stop: Any) -> tuple[str, ...]:
    stops: Sequence[Any] = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise BadRequest(422, "stop must be a string or a list of strings", param="stop")
    if len(stops) > MAX_STOPS or not all(0 < len(each) <= MAX_STOP_CHARS for each in stops):
        raise BadRequest(400, f"stop must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters",
                         param="stop")
    return tuple(stops)

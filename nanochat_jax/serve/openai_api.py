"""OpenAI's chat API: POST /v1/chat/completions and GET /v1/models, also without /v1.

openai_request.py has the fields of a request. Defaults are the server's, including top-k, which a
request may set as `top_k`. A conversation that does not fit the context is refused: an API does not
drop messages. The reply's text excludes calculations; the usage and the log-probabilities include
them. Completions of text are in text_completions.py.

Reference: https://platform.openai.com/docs/api-reference/chat
"""

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel

from nanochat_jax.infer.request import Result, Sampling
from nanochat_jax.infer.scheduler import Event
from nanochat_jax.serve.access import OPENAI, error_body, read_json
from nanochat_jax.serve.chat_request import BadRequest, make_prompt
from nanochat_jax.serve.logprobs import ChatLogprobs, chat_logprobs
from nanochat_jax.serve.openai_request import CompletionRequest, check_model, parse
from nanochat_jax.serve.replies import EventStream, Replies, ReplyError, encode
from nanochat_jax.tokenizer import Tokenizer

__all__ = ["Completion", "ModelCard", "ModelList", "OpenAIServer", "parse"]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nanochat_jax"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "cancelled"]


class PromptTokensDetails(BaseModel):
    cached_tokens: int  # whose keys and values were in the cache already


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, results: Iterable[Result]) -> "Usage":
        """Usage of the replies to one prompt."""
        results = list(results)
        prompt, completion = results[0].prompt_tokens, sum(len(result.tokens) for result in results)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=results[0].cached_tokens),
        )


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


@dataclass(frozen=True, kw_only=True)
class OpenAIServer:
    """The handlers of /v1. `model` is the id that clients ask for."""

    replies: Replies
    tokenizer: Tokenizer
    model: str
    max_len: int
    defaults: Sampling
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def card(self) -> ModelCard:
        return ModelCard(id=self.model, created=self.created, max_model_len=self.max_len)

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response(ModelList(data=[self.card]).model_dump())

    async def show_model(self, request: web.Request) -> web.Response:
        check_model(request.match_info["model"], self.model)
        return web.json_response(self.card.model_dump())

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self.reply(request, await read_json(request))

    async def reply(self, request: web.Request, body: Any) -> web.StreamResponse:
        """Answer a request for chat completions whose body has been decoded."""
        request[OPENAI] = True
        chat = parse(body, self.model)
        sampling = chat.sampling(self.defaults)
        turns = chat.conversation()
        prompt, _ = make_prompt(
            self.tokenizer,
            turns,
            max_len=self.max_len,
            max_tokens=sampling.max_tokens,
            drop=False,
            ending=chat.ending(turns[-1]["role"]),
        )
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.model,
        }
        requests = chat.requests(prompt, sampling)

        async def logprobs(results: Sequence[Result]) -> list[ChatLogprobs | None]:
            return await self._logprobs(chat, prompt, results)

        if not chat.stream:
            results = await self.replies.results(requests)
            completion = _completion(head, results, await logprobs(results))
            return web.json_response(completion.model_dump())
        options = chat.stream_options
        chunks = _Chunks(head, len(requests), bool(options is not None and options.include_usage))
        async with self.replies.open(requests) as events:
            return await _stream(request, chunks, events, logprobs)

    async def _logprobs(
        self, chat: CompletionRequest, prompt: tuple[int, ...], results: Sequence[Result]
    ) -> list[ChatLogprobs | None]:
        """Log-probabilities of replies to one prompt, if the request wants them."""
        top = chat.top_logprobs or 0
        if not (chat.logprobs or top):
            return [None] * len(results)
        scores = await self.replies.scores([[*prompt, *r.tokens] for r in results], top)
        return [
            chat_logprobs(self.tokenizer, result.tokens, scored, top)
            for result, scored in zip(results, scores)
        ]


def _completion(
    head: Mapping[str, Any], results: Sequence[Result], logprobs: Sequence[ChatLogprobs | None]
) -> Completion:
    choices = [
        Choice(
            index=index,
            message=ReplyMessage(content=result.text),
            logprobs=logged,
            finish_reason=result.finish_reason,
        )
        for index, (result, logged) in enumerate(zip(results, logprobs))
    ]
    return Completion(**head, choices=choices, usage=Usage.of(results))


class _Chunks:
    """The chunks of a streamed completion, as JSON."""

    def __init__(self, head: Mapping[str, Any], choices: int, include_usage: bool) -> None:
        self.head = {"object": "chat.completion.chunk", **head}
        self.choices = range(choices)
        self.include_usage = include_usage
        # A chunk of text but for the text, encoded once.
        self._around = [
            encode(self.delta(index, {"content": ""})).split('"content": ""')
            for index in self.choices
        ]

    def delta(
        self,
        index: int,
        delta: Mapping[str, Any],
        reason: str | None = None,
        logprobs: ChatLogprobs | None = None,
    ) -> dict[str, Any]:
        logged = None if logprobs is None else logprobs.model_dump()
        choice = {"index": index, "delta": delta, "logprobs": logged, "finish_reason": reason}
        usage = {"usage": None} if self.include_usage else {}
        return {**self.head, "choices": [choice], **usage}

    def text(self, index: int, text: str) -> str:
        return f'"content": {encode(text)}'.join(self._around[index])

    def usage(self, results: Iterable[Result]) -> dict[str, Any]:
        return {**self.head, "choices": [], "usage": Usage.of(results).model_dump()}


async def _stream(
    request: web.Request,
    chunks: _Chunks,
    events: AsyncIterator[list[tuple[int, Event]]],
    logprobs: Callable[[Sequence[Result]], Awaitable[list[ChatLogprobs | None]]],
) -> web.StreamResponse:
    """Stream replies. The log-probabilities of a reply come with its last chunk."""
    results: list[Result] = []
    async with EventStream(request) as stream:
        try:
            role = {"role": "assistant", "content": "", "refusal": None}
            await stream.send(*(chunks.delta(index, role) for index in chunks.choices))
            async for batch in events:
                send: list[Mapping[str, Any] | str] = []
                for index, event in batch:
                    if isinstance(event, str):
                        send.append(chunks.text(index, event))
                    elif isinstance(event, Result):
                        results.append(event)
                        [logged] = await logprobs([event])
                        send.append(chunks.delta(index, {}, event.finish_reason, logged))
                if send:
                    await stream.send(*send)
            if chunks.include_usage:
                await stream.send(chunks.usage(results))
            await stream.send("[DONE]")
        except (ReplyError, BadRequest) as error:
            await stream.send(error_body(error.status, error.detail, code=error.code))
    return stream.response

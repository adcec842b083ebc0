"""OpenAI's completions of text: POST /v1/completions, also without /v1.

For base models, and for programs that score given text, such as lm-evaluation-harness: `echo` with
`logprobs` returns the log-probability of each token of the prompt.

A prompt that is text begins with bos, as documents do in training; the echo leaves it out. A prompt
that is a list of token ids is used as it is. Text never becomes a special token.

Reference: https://platform.openai.com/docs/api-reference/completions
"""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, Field, Tag

from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.request import FinishReason, Sampling
from nanochat_jax.infer.streaming import TextStream
from nanochat_jax.infer.token_scores import MOST_TOP, TokenScores, check_tokens
from nanochat_jax.serve.access import read_json
from nanochat_jax.serve.chat_request import (
    MAX_TOKENS,
    BadRequest,
    SamplingFields,
    Whole,
    check,
    text_or_parts,
)
from nanochat_jax.serve.logprobs import TextLogprobs, text_logprobs
from nanochat_jax.serve.openai_request import (
    MAX_CHOICES,
    NEUTRAL_FIELDS,
    AnyTopK,
    Known,
    Seed,
    Stop,
    Text,
    check_model,
    one_or_more,
    seeds,
)
from nanochat_jax.serve.replies import Replies
from nanochat_jax.tokenizer import Tokenizer

MAX_PROMPTS = 256  # of one request

# Some tasks of lm-evaluation-harness have more than the four that chat allows.
Stops = Annotated[list[Stop], Field(max_length=16)]
TokenId = Annotated[int, Field(ge=0, lt=2**31), Whole]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=2**17, fail_fast=True)]
Prompts = Annotated[
    list[Annotated[Annotated[Text, Tag("str")] | Annotated[TokenIds, Tag("list")], text_or_parts]],
    Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
]


def _as_list(prompt: Any) -> Any:
    """One prompt as a list of one."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], str | list):
        return [prompt]
    return [prompt] if isinstance(prompt, str) else prompt


class TextCompletionRequest(SamplingFields, Known):
    NEUTRAL = {
        **{name: values for name, values in NEUTRAL_FIELDS.items() if name != "echo"},
        "stream": (False,),
        "suffix": ("",),
    }
    SAMPLING = ("temperature", "top_k", "top_p", "stop")

    model: str | None = None
    prompt: Annotated[
        Prompts, BeforeValidator(_as_list, json_schema_input_type=Text | TokenIds | Prompts)
    ]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP), Whole] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS), Whole] | None = None
    top_k: AnyTopK | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole] | None = None
    seed: Seed | None = None
    stop: Annotated[Stops, one_or_more(Stops)] | None = None


class TextChoice(BaseModel):
    index: int  # prompt * n + number of the choice
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextUsage(BaseModel):
    prompt_tokens: int  # of all prompts
    completion_tokens: int
    total_tokens: int


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: TextUsage


@dataclass(frozen=True)
class _Prompt:
    tokens: tuple[int, ...]
    text: str  # without the bos that the server added
    first: int  # index of the first token that the echo shows


@dataclass(frozen=True)
class _Continuation:
    tokens: list[int]
    text: str
    finish_reason: FinishReason


NOTHING = _Continuation([], "", "length")


@dataclass(frozen=True, kw_only=True)
class TextCompletions:
    """The handler. `model` is the id that clients ask for."""

    replies: Replies
    engine: Engine
    tokenizer: Tokenizer
    model: str
    defaults: Sampling

    async def complete(self, request: web.Request) -> web.Response:
        asked = check(TextCompletionRequest, await read_json(request))
        if asked.model is not None:
            check_model(asked.model, self.model)
        limit = self.defaults.max_tokens if asked.max_tokens is None else asked.max_tokens
        sampling = dataclasses.replace(asked.sampling(self.defaults), max_tokens=max(1, limit))
        prompts = [self._prompt(prompt, limit) for prompt in asked.prompt]
        each = [prompt for prompt in prompts for _ in range(asked.n or 1)]
        scores = None
        if limit == 0:
            continuations = [NOTHING] * len(each)
        elif (
            limit == 1
            and asked.logprobs is not None
            and sampling.temperature == 0
            and not sampling.stop
        ):
            # The scores of the prompts contain the most likely next tokens.
            scores = await self._scores(asked, each, [NOTHING] * len(each))
            continuations = [self._next_token(scored) for scored in scores]
        else:
            continuations = await self._generate(asked, each, sampling)
        if asked.logprobs is not None and scores is None:
            scores = await self._scores(asked, each, continuations)
        answer = TextCompletion(
            id=f"cmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=self.model,
            choices=[
                self._choice(asked, index, *pair, scores[index] if scores else None)
                for index, pair in enumerate(zip(each, continuations))
            ],
            usage=_usage(prompts, continuations),
        )
        return web.json_response(answer.model_dump())

    def _prompt(self, prompt: str | list[int], limit: int) -> _Prompt:
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, prepend=self.tokenizer.bos_id)
        else:
            tokens = prompt
        try:
            check_tokens(self.engine, tokens)
        except ValueError as error:
            raise BadRequest(400, str(error), param="prompt") from error
        if len(tokens) + min(1, limit) > self.engine.max_len:
            detail = (
                f"a prompt of {len(tokens)} tokens leaves no room for a completion in the context "
                f"of {self.engine.max_len}: send less, or max_tokens: 0"
            )
            raise BadRequest(400, detail, param="prompt", code="context_length_exceeded")
        if isinstance(prompt, str):
            return _Prompt(tuple(tokens), prompt, 1)
        return _Prompt(tuple(tokens), self.tokenizer.decode(tokens), 0)

    async def _generate(
        self, asked: TextCompletionRequest, prompts: Sequence[_Prompt], sampling: Sampling
    ) -> list[_Continuation]:
        count = asked.n or 1
        seed = seeds(asked.seed, count)
        results = await self.replies.results(
            [
                sampling.request(prompt.tokens, seed=seed[index % count])
                for index, prompt in enumerate(prompts)
            ]
        )
        return [
            _Continuation(result.tokens, result.text, result.finish_reason) for result in results
        ]

    async def _scores(
        self,
        asked: TextCompletionRequest,
        prompts: Sequence[_Prompt],
        continuations: Sequence[_Continuation],
    ) -> list[TokenScores]:
        pairs = zip(prompts, continuations)
        sequences = [[*prompt.tokens, *after.tokens] for prompt, after in pairs]
        return await self.replies.scores(sequences, max(1, asked.logprobs or 0))

    def _next_token(self, scores: TokenScores) -> _Continuation:
        """The most likely token after a prompt. One that ends the text is listed as well."""
        token, vocabulary = int(scores.top_ids[-1, 0]), self.engine.vocabulary
        data = b"" if token in vocabulary.special else self.tokenizer.decode_bytes([token])
        text = TextStream().feed(data)
        return _Continuation([token], text, "stop" if token in vocabulary.terminal else "length")

    def _choice(
        self,
        asked: TextCompletionRequest,
        index: int,
        prompt: _Prompt,
        after: _Continuation,
        scores: TokenScores | None,
    ) -> TextChoice:
        logprobs = None
        if scores is not None:
            logprobs = text_logprobs(
                self.tokenizer,
                [*prompt.tokens, *after.tokens],
                scores,
                first=prompt.first if asked.echo else len(prompt.tokens),
                top=asked.logprobs or 0,
            )
        return TextChoice(
            index=index,
            text=prompt.text * bool(asked.echo) + after.text,
            logprobs=logprobs,
            finish_reason=after.finish_reason,
        )


def _usage(prompts: Sequence[_Prompt], continuations: Sequence[_Continuation]) -> TextUsage:
    read = sum(len(prompt.tokens) for prompt in prompts)
    written = sum(len(after.tokens) for after in continuations)
    return TextUsage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

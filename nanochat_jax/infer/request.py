"""Requests, their sampling, results, and the state of one generation."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Protocol

from nanochat_jax.errors import UsageError
from nanochat_jax.infer.calculator import calculate
from nanochat_jax.infer.streaming import TextStream
from nanochat_jax.tokenizer import SPECIAL_TOKENS

FinishReason = Literal["stop", "length", "cancelled"]

MAX_STOP_TOKENS = 4  # of one request


class TokenizerLike(Protocol):
    """The part of `nanochat_jax.tokenizer.Tokenizer` that generation needs."""

    @property
    def special_tokens(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode_bytes(self, ids: list[int]) -> bytes: ...


class NoTokenizer:
    """Stand-in for weights without a tokenizer: no special tokens, and ids decode to no text."""

    special_tokens = dict.fromkeys(SPECIAL_TOKENS, -1)

    def encode(self, text: str) -> list[int]:
        raise UsageError(
            "these weights have no tokenizer: pass token ids, or put tokenizer.pkl beside them"
        )

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw a reply."""

    # maximum number of new tokens, injected ones included; limited by the context
    max_tokens: int = 256
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    # keep the fewest most likely tokens whose probability reaches p; 1 keeps all
    top_p: float = 1.0
    seed: int = 0  # seed of the random stream, which does not depend on other requests in the batch
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings to appear
    # at most `MAX_STOP_TOKENS` ids or names of special tokens that end the reply
    stop_tokens: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        texts = not isinstance(self.stop, str) and all(self.stop)
        few = not isinstance(self.stop_tokens, str) and len(self.stop_tokens) <= MAX_STOP_TOKENS
        for name, valid, rule in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("stop", texts, "a sequence of nonempty strings"),
            ("stop_tokens", few, f"a sequence of at most {MAX_STOP_TOKENS}"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))

    def request(self, tokens: Iterable[int], **changes: Any) -> "Request":
        """Return a request with this sampling, except for `changes`."""
        return Request(tuple(tokens), **vars(self) | changes)


@dataclass(frozen=True)
class Request(Sampling):
    """One generation: a prompt and how to draw its reply."""

    tokens: tuple[int, ...]  # the prompt, with its special tokens; at least one
    _: KW_ONLY
    # cut a prompt that leaves no room for `max_tokens` (or half of the context) from the left,
    # after a leading bos
    truncate: bool = False
    logprobs: bool = False  # return the log-probability of each token

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tokens", tuple(map(int, self.tokens)))
        if not self.tokens:
            raise ValueError("the prompt has no tokens")


@dataclass(frozen=True)
class ToolCall:
    """An expression the model generated; `output` is None if there is no result."""

    expression: str
    output: str | None


@dataclass(frozen=True)
class Result:
    """The outcome of a request."""

    tokens: list[int]  # the generated ids, without the terminal token
    sampled: list[bool]  # for each token, True if the model sampled it, False if it was injected
    # "stop" (a terminal token, a stop token or a stop string), "length", or "cancelled"
    finish_reason: FinishReason
    text: str  # the text outside tool calls and their output, without special tokens
    prompt_tokens: int  # length of the prompt, after truncation
    # number of prompt tokens whose keys and values were already in the cache
    cached_tokens: int = 0
    # if requested, the natural log-probability of each token, sampled or injected, before
    # temperature, top-k and top-p
    logprobs: list[float] | None = None


class Vocabulary:
    """The tokenizer and the ids of its special tokens."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        special = tokenizer.special_tokens
        self.tokenizer = tokenizer
        self.special_ids = special
        self.special = frozenset(special.values())
        self.bos = special["<|bos|>"]
        self.terminal = (special["<|assistant_end|>"], special["<|bos|>"])
        self.python_start, self.python_end = special["<|python_start|>"], special["<|python_end|>"]
        self.output_start, self.output_end = special["<|output_start|>"], special["<|output_end|>"]

    @property
    def max_stop_ids(self) -> int:
        """Maximum number of ids that end a reply: terminal tokens and a request's own."""
        return len(self.terminal) + MAX_STOP_TOKENS

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")

    def resolve(self, stop: int | str, vocab_size: int) -> int:
        """Return the id of a stop token. Raises ValueError if it is unknown."""
        if isinstance(stop, str):
            if stop not in self.special_ids:
                raise ValueError(
                    f"unknown stop token {stop!r}: give an id, or one of "
                    f"{', '.join(self.special_ids)}"
                )
            return self.special_ids[stop]
        if not 0 <= stop < vocab_size:
            raise ValueError(
                f"unknown stop token {stop}: the vocabulary has the ids 0 to {vocab_size - 1}"
            )
        return int(stop)


class Generation:
    """An active request: its tokens so far, its text and its tool calls.

    The tokens between python_start and python_end are an expression. If the calculator has a value
    for it, output_start, the value and output_end are queued in `injected`; the engine feeds them
    in place of drawn tokens.
    """

    def __init__(
        self,
        request: Request,
        prompt: tuple[int, ...],
        max_tokens: int,
        stop_ids: Sequence[int],
        vocabulary: Vocabulary,
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.stop_ids = (*vocabulary.terminal, *stop_ids)
        self.tokens: list[int] = []
        self.sampled: list[bool] = []
        self.logprobs: list[float] = []
        self.injected: deque[int] = deque()
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None  # fails only this request
        self.reused = 0  # prompt tokens whose keys and values were in the cache already
        self._vocabulary = vocabulary
        self._expression: list[int] | None = None
        self._in_output = False
        self._stream = TextStream(request.stop)
        self._text: list[str] = []
        self._events: list[str | ToolCall] = []

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def length(self) -> int:
        """Number of tokens in the KV cache: all but the newest, which the next step feeds."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def cached(self) -> tuple[int, ...]:
        """The tokens in the KV cache, once the prompt is prefilled."""
        return (*self.prompt, *self.tokens)[: self.length]

    @property
    def newest(self) -> tuple[int, int]:
        """The last two tokens, prompt included, oldest first; 0 if there is only one."""
        before, last = (0, *self.prompt[-2:], *self.tokens[-2:])[-2:]
        return before, last

    def accept(self, token: int, *, sampled: bool, logprob: float = math.nan) -> None:
        """Append the next token; set `finish_reason` at the end of the reply."""
        vocabulary = self._vocabulary
        if sampled and token in self.stop_ids:
            self.finish("stop")
            return
        self.tokens.append(token)
        self.sampled.append(sampled)
        if self.request.logprobs:
            self.logprobs.append(logprob)
        if token == vocabulary.python_start:
            self._expression = []
        elif token == vocabulary.python_end and self._expression is not None:
            self._run_tool()
        elif self._expression is not None:
            self._expression.append(token)
        elif token in (vocabulary.output_start, vocabulary.output_end):
            self._in_output = token == vocabulary.output_start
        if token in vocabulary.special:
            self._stream.break_character()
        elif self._expression is None and not self._in_output:
            self._show(self._stream.feed(vocabulary.tokenizer.decode_bytes([token])))
        if self._stream.stopped:
            self.finish("stop")
        elif len(self.tokens) >= self.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        self._show(self._stream.finish())
        if self._expression:  # an unclosed tool call is reported without a result
            self._events.append(ToolCall(self._vocabulary.text(self._expression), None))
            self._expression = None
        self.finish_reason = reason

    def take_events(self) -> list[str | ToolCall]:
        """Return and clear the text and tool calls since the last call."""
        events, self._events = self._events, []
        return events

    def result(self) -> Result:
        """Return the result. Raises the request's error, or RuntimeError if it is not done."""
        if self.error is not None:
            raise self.error
        if self.finish_reason is None:
            raise RuntimeError("the generation has not finished")
        logprobs = self.logprobs if self.request.logprobs else None
        return Result(
            self.tokens,
            self.sampled,
            self.finish_reason,
            "".join(self._text),
            len(self.prompt),
            self.reused,
            logprobs,
        )

    def _run_tool(self) -> None:
        vocabulary, tokens, self._expression = self._vocabulary, self._expression, None
        if not tokens:
            return
        expression = vocabulary.text(tokens)
        value = calculate(expression)
        output = None if value is None else str(value)
        if output is not None:
            ids = vocabulary.tokenizer.encode(output)
            self.injected.extend([vocabulary.output_start, *ids, vocabulary.output_end])
        self._events.append(ToolCall(expression, output))

    def _show(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._events.append(text)

"""What is asked of the engine, what comes back, and the host's side of one generation."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal, Protocol

from nanochat_jax.infer.calculator import calculate
from nanochat_jax.infer.streaming import TextStream

FinishReason = Literal["stop", "length", "cancelled"]


class TokenizerLike(Protocol):
    """The part of `nanochat_jax.tokenizer.Tokenizer` that generation needs."""

    special_tokens: Mapping[str, int]

    def encode(self, text: str) -> list[int]: ...

    def decode_bytes(self, ids: list[int]) -> bytes: ...


@dataclass(frozen=True)
class Request:
    """One generation.

    Attributes:
        tokens: the prompt, with its special tokens; at least one.
        max_tokens: most tokens to generate, those a tool writes included; less where the context is too short for it.
        temperature: 0 takes the most likely token each time.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probability reaches p; 1 keeps all.
        seed: names the random stream: the same request always gives the same tokens, whoever shares the batch.
        stop: the text ends before the first of these strings to appear.
    """

    tokens: tuple[int, ...]
    _: KW_ONLY
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(map(int, self.tokens)))
        if not self.tokens:
            raise ValueError("the prompt has no tokens")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be over 0 and at most 1, got {self.top_p}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be a sequence of strings that are not empty, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True)
class ToolCall:
    """A calculation the model asked for, and its result as text; None where the calculator refused it."""

    expression: str
    output: str | None


@dataclass(frozen=True)
class Result:
    """What became of a request.

    Attributes:
        tokens: the generated ids, without the terminal token.
        sampled: for each of them whether the model drew it; False where a tool wrote it.
        finish_reason: "stop" (a terminal token or a stop string), "length", or "cancelled".
        text: the text outside of tool calls, without special tokens; `tokenizer.decode(tokens)` shows everything.
        prompt_tokens: length of the prompt.
    """

    tokens: list[int]
    sampled: list[bool]
    finish_reason: FinishReason
    text: str
    prompt_tokens: int


class Vocabulary:
    """The special tokens that steer a generation, and the bytes of the others."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        special = tokenizer.special_tokens
        self.tokenizer = tokenizer
        self.special = frozenset(special.values())
        self.terminal = (special["<|assistant_end|>"], special["<|bos|>"])
        self.python_start, self.python_end = special["<|python_start|>"], special["<|python_end|>"]
        self.output_start, self.output_end = special["<|output_start|>"], special["<|output_end|>"]


class Generation:
    """A request in flight: its tokens so far, the tool state machine, and the text to show.

    Tool calls: the tokens between python_start and python_end are an expression. If the calculator has a value for it,
    output_start, the value and output_end are queued in `forced`; the engine feeds them in place of drawn tokens.
    """

    def __init__(self, request: Request, max_tokens: int, vocabulary: Vocabulary) -> None:
        self.request = request
        self.max_tokens = max_tokens
        self.tokens: list[int] = []
        self.sampled: list[bool] = []
        self.forced: deque[int] = deque()
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None  # what went wrong with this request alone
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
        """Tokens of it in the KV cache once admitted: all but the newest, which the next step feeds."""
        return len(self.request.tokens) + len(self.tokens) - 1

    def accept(self, token: int, *, sampled: bool) -> None:
        """Take the next token; sets `finish_reason` if it is the last."""
        vocabulary = self._vocabulary
        if token in vocabulary.terminal:
            self.finish("stop")
            return
        self.tokens.append(token)
        self.sampled.append(sampled)
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
        self.finish_reason = reason

    def take_events(self) -> list[str | ToolCall]:
        """Text and tool calls that came since the last call."""
        events, self._events = self._events, []
        return events

    def result(self) -> Result:
        """The outcome; raises what went wrong with this request, if anything did."""
        if self.error is not None:
            raise self.error
        if self.finish_reason is None:
            raise RuntimeError("the generation has not finished")
        return Result(self.tokens, self.sampled, self.finish_reason, "".join(self._text), len(self.request.tokens))

    def _run_tool(self) -> None:
        vocabulary, tokens, self._expression = self._vocabulary, self._expression, None
        if not tokens:
            return
        expression = vocabulary.tokenizer.decode_bytes(tokens).decode("utf-8", errors="replace")
        value = calculate(expression)
        output = None if value is None else str(value)
        if output is not None:
            self.forced.extend([vocabulary.output_start, *vocabulary.tokenizer.encode(output), vocabulary.output_end])
        self._events.append(ToolCall(expression, output))

    def _show(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._events.append(text)

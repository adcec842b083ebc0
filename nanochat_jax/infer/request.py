"""What is asked of the engine, what comes back, and the host's side of one generation."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, Protocol

from nanochat_jax.cli import UsageError
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
    """For weights without one: no token is special, so that nothing but the length ends a reply,
    and ids have no text.
    """

    special_tokens = dict.fromkeys(SPECIAL_TOKENS, -1)

    def encode(self, text: str) -> list[int]:
        raise UsageError(
            "these weights came without a tokenizer: give token ids, or put tokenizer.pkl beside "
            "them"
        )

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b""


@dataclass(frozen=True)
class Request:
    """One generation.

    Attributes:
        tokens: the prompt, with its special tokens; at least one.
        max_tokens: most tokens to generate, those a tool writes included; less where the context
          is too short for it.
        temperature: 0 takes the most likely token each time.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probability reaches p; 1 keeps all.
        seed: names the random stream: the same request always gives the same tokens, whoever
          shares the batch.
        stop: the text ends before the first of these strings to appear.
        stop_tokens: ids, or names of special tokens, that end the reply as `<|assistant_end|>`
            does; `MAX_STOP_TOKENS` at most.
        truncate: cut a prompt that leaves no room for `max_tokens` (or half of the context) from
            the left, but for a leading bos, rather than refuse it.
        logprobs: ask for the log-probability of each token.
    """

    tokens: tuple[int, ...]
    _: KW_ONLY
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int | str, ...] = ()
    truncate: bool = False
    logprobs: bool = False

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
            raise ValueError(
                f"stop must be a sequence of strings that are not empty, got {self.stop!r}"
            )
        object.__setattr__(self, "stop", tuple(self.stop))
        if isinstance(self.stop_tokens, str) or len(self.stop_tokens) > MAX_STOP_TOKENS:
            raise ValueError(
                f"stop_tokens must be a sequence of at most {MAX_STOP_TOKENS}, got "
                f"{self.stop_tokens!r}"
            )
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))


@dataclass(frozen=True)
class ToolCall:
    """A calculation the model asked for, and its result as text; None where the calculator refused
    it.
    """

    expression: str
    output: str | None


@dataclass(frozen=True)
class Result:
    """What became of a request.

    Attributes:
        tokens: the generated ids, without the terminal token.
        sampled: for each of them whether the model drew it; False where a tool wrote it.
        finish_reason: "stop" (a terminal token, a stop token or a stop string), "length", or
          "cancelled".
        text: the text outside of tool calls, without special tokens; `tokenizer.decode(tokens)`
          shows everything.
        prompt_tokens: length of the prompt, after truncation.
        logprobs: if asked for, the natural logarithm of the model's probability of each token,
            drawn or not, before temperature, top-k and top-p.
    """

    tokens: list[int]
    sampled: list[bool]
    finish_reason: FinishReason
    text: str
    prompt_tokens: int
    logprobs: list[float] | None = None


class Vocabulary:
    """The special tokens that steer a generation, and the bytes of the others."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        special = tokenizer.special_tokens
        self.tokenizer = tokenizer
        self.special_ids = special
        self.special = frozenset(special.values())
        self.bos = special["<|bos|>"]
        self.terminal = (special["<|assistant_end|>"], special["<|bos|>"])
        self.python_start, self.python_end = special["<|python_start|>"], special["<|python_end|>"]
        self.output_start, self.output_end = special["<|output_start|>"], special["<|output_end|>"]

    def resolve(self, stop: int | str, vocab_size: int) -> int:
        """Id of a stop token; ValueError if there is none such."""
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
    """A request in flight: its tokens so far, the tool state machine, and the text to show.

    Tool calls: the tokens between python_start and python_end are an expression. If the calculator
    has a value for it, output_start, the value and output_end are queued in `forced`; the engine
    feeds them in place of drawn tokens.
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
        """Tokens of it in the KV cache once admitted: all but the newest, which the next step
        feeds.
        """
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def newest(self) -> tuple[int, int]:
        """The last two tokens, prompt included, oldest first; 0 stands for one that is not
        there.
        """
        before, last = (0, *self.prompt[-2:], *self.tokens[-2:])[-2:]
        return before, last

    def accept(self, token: int, *, sampled: bool, logprob: float = math.nan) -> None:
        """Take the next token; sets `finish_reason` if it is the last."""
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
        if self._expression:  # a call that nothing closed is shown, without a result
            expression = self._vocabulary.tokenizer.decode_bytes(self._expression).decode(
                "utf-8", errors="replace"
            )
            self._events.append(ToolCall(expression, None))
            self._expression = None
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
        logprobs = self.logprobs if self.request.logprobs else None
        return Result(
            self.tokens,
            self.sampled,
            self.finish_reason,
            "".join(self._text),
            len(self.prompt),
            logprobs,
        )

    def _run_tool(self) -> None:
        vocabulary, tokens, self._expression = self._vocabulary, self._expression, None
        if not tokens:
            return
        expression = vocabulary.tokenizer.decode_bytes(tokens).decode("utf-8", errors="replace")
        value = calculate(expression)
        output = None if value is None else str(value)
        if output is not None:
            self.forced.extend(
                [
                    vocabulary.output_start,
                    *vocabulary.tokenizer.encode(output),
                    vocabulary.output_end,
                ]
            )
        self._events.append(ToolCall(expression, output))

    def _show(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._events.append(text)

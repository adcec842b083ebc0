"""Chatting with a model in a terminal."""

import io
import os
import re
import sys

from nanochat_jax.conversation import render_message
from nanochat_jax.errors import UsageError
from nanochat_jax.infer.engine import Engine, EngineLoop
from nanochat_jax.infer.request import Generation, Sampling, ToolCall
from nanochat_jax.tokenizer import Tokenizer

HELP = (
    "/clear starts over, /quit or Ctrl-D leaves (both also without the slash), Ctrl-C stops a "
    "reply, /help prints this."
)
# characters that a terminal interprets
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class History:
    """The tokens of a conversation by turn; the oldest turns are dropped if the context is full."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._turns: list[list[int]] = []

    def prompt(self, text: str, *, room: int) -> tuple[list[int], int]:
        """Return the prompt for the reply to `text`, and the number of turns dropped for `room`."""
        question, before = self._question(text), len(self._turns)

        def length() -> int:
            return 1 + sum(map(len, self._turns)) + len(question)

        while self._turns and 1 + len(question) <= room < length():
            del self._turns[0]
        return [self._tokenizer.bos_id, *sum(self._turns, []), *question], before - len(self._turns)

    def add(self, text: str, reply: list[int]) -> None:
        start, end, reply_end = map(
            self._tokenizer.encode_special,
            ("<|python_start|>", "<|python_end|>", "<|assistant_end|>"),
        )
        call = reply[-1 - reply[::-1].index(start) :] if start in reply else []
        if call and end not in call:
            reply = reply[: -len(call)]  # truncated in a tool call
        self._turns.append([*self._question(text), *reply, reply_end])

    def _question(self, text: str) -> list[int]:
        return [
            *render_message(self._tokenizer, "user", text)[0],
            self._tokenizer.encode_special("<|assistant_start|>"),
        ]


class Terminal:
    """A conversation on standard input and output."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, sampling: Sampling) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._history = History(tokenizer)
        self._num_replies = 0

    def answer_once(self, text: str) -> Generation:
        """Print the reply to one message. Raises `UsageError` if it does not fit the context."""
        tokens, _ = self._history.prompt(text, room=self._engine.max_len)
        try:
            reply = self._engine.generation(self._sampling.request(tokens))
        except ValueError as error:
            raise UsageError(f"`prompt`: {error}") from error
        self._print_reply(reply)
        return reply

    def chat(self) -> None:
        """Read messages and answer them until the input ends."""
        print(HELP)
        while True:
            try:
                text = input("\nUser: ").strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                print()
                return
            command = text.lower()
            if command in ("quit", "exit", "/quit", "/exit"):
                return
            if command == "/help":
                print(HELP)
            elif command in ("clear", "/clear"):
                self._history = History(self._tokenizer)
                print(dim("(a new conversation)"))
            elif text:
                self._answer(text)

    def _answer(self, text: str) -> None:
        max_len, sampling = self._engine.max_len, self._sampling
        room = max_len - min(sampling.max_tokens, max_len // 2)
        tokens, dropped = self._history.prompt(text, room=room)
        if dropped:
            turns = f"dropped the oldest {dropped} turns"
            print(dim(f"(the context of {max_len} tokens is full: {turns})"))
        request = sampling.request(tokens, seed=sampling.seed + self._num_replies)
        try:
            reply = self._engine.generation(request)
        except ValueError as error:  # the message alone is too long
            print(dim(f"({error}: use fewer words)"))
            return
        print("\nAssistant: ", end="", flush=True)
        self._print_reply(reply)
        self._history.add(text, reply.tokens)
        self._num_replies += 1
        if reply.finish_reason == "length":
            print(dim(f"(cut after {len(reply.tokens)} tokens)"))

    def _print_reply(self, generation: Generation) -> None:
        """Generate a reply and print it as it arrives; Ctrl-C ends it early."""
        loop = EngineLoop(self._engine)
        try:
            loop.admit([generation])
            while not generation.done:
                print_events(generation)
                loop.step()
        except KeyboardInterrupt:
            loop.cancel(generation)
        print_events(generation)
        print(flush=True)
        generation.result()  # raises the error, if there was one


def print_events(generation: Generation) -> None:
    for event in generation.take_events():
        if isinstance(event, ToolCall):
            call = f"[{event.expression} = {'?' if event.output is None else event.output}]"
            print(dim(CONTROL.sub("\ufffd", call)), end=" ", flush=True)
        else:
            print(CONTROL.sub("\ufffd", event), end="", flush=True)


def dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text


def make_stdin_readable() -> None:
    """Read any bytes of standard input as text; a closed one is empty."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")

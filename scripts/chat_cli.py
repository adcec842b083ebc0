"""Chat with a trained model in the terminal.

    python -m scripts.chat_cli                              the newest finetuned model
    python -m scripts.chat_cli -i rl -g d20                 another stage or model
    python -m scripts.chat_cli -p "Why is the sky blue?"    one reply, then exit

The model's calculations are printed as [345+678 = 1023].
"""

import io
import os
import re
import sys
from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.cli import LARGEST_SEED, flag
from nanochat_jax.conversation import render_message
from nanochat_jax.devices import ModelFlags, start
from nanochat_jax.errors import UsageError
from nanochat_jax.infer.engine import Engine, EngineLoop, Request
from nanochat_jax.infer.request import Generation, ToolCall
from nanochat_jax.paths import CHECKPOINT_DIRS, Paths
from nanochat_jax.pretrained import load_engine
from nanochat_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config(ModelFlags):
    source: str = flag(
        "sft", "stage whose model to load", short="-i", choices=list(CHECKPOINT_DIRS)
    )
    prompt: str | None = flag(None, "answer this and exit", short="-p")
    temperature: float = flag(
        0.6,
        "sampling temperature; 0 takes the most likely token each time",
        short="-t",
        at_least=0,
        at_most=100,
    )
    top_k: int = flag(
        50,
        "draw among the k most likely tokens; 0 among all",
        short="-k",
        at_least=0,
        at_most=10**6,
    )
    max_tokens: int = flag(256, "longest reply in tokens", at_least=1, at_most=2**24)
    seed: int = flag(
        42,
        "of the random draws; a conversation with the same seed repeats itself",
        at_least=0,
        at_most=LARGEST_SEED,
    )

    def request(self, tokens: list[int], *, turn: int) -> Request:
        return Request(
            tuple(tokens),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed + turn,
        )


class History:
    """The tokens of a conversation by turn; the oldest turns are dropped if the context is full."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._turns: list[list[int]] = []

    def prompt(self, text: str, *, room: int) -> tuple[list[int], int]:
        """(prompt tokens for the reply to `text`, number of turns dropped to fit into `room`)."""
        question, before = self._question(text), len(self._turns)
        while self._turns and 1 + len(question) <= room < 1 + sum(map(len, self._turns)) + len(
            question
        ):
            del self._turns[0]
        return [self._tokenizer.bos_id, *sum(self._turns, []), *question], before - len(self._turns)

    def add(self, text: str, reply: list[int]) -> None:
        start, end = map(self._tokenizer.encode_special, ("<|python_start|>", "<|python_end|>"))
        if (
            start in (call := reply[-1 - reply[::-1].index(start) :] if start in reply else [])
            and end not in call
        ):
            reply = reply[: -len(call)]  # truncated in a tool call
        self._turns.append(
            [*self._question(text), *reply, self._tokenizer.encode_special("<|assistant_end|>")]
        )

    def _question(self, text: str) -> list[int]:
        return [
            *render_message(self._tokenizer, "user", text)[0],
            self._tokenizer.encode_special("<|assistant_start|>"),
        ]


HELP = (
    "/clear starts over, /quit or Ctrl-D leaves (both also without the slash), Ctrl-C stops a "
    "reply, "
    "/help says this again."
)

# A terminal would interpret these.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text


def answer(engine: Engine, generation: Generation) -> None:
    """Generate a reply and print it as it arrives; Ctrl-C ends it early."""

    def show() -> None:
        for event in generation.take_events():
            if isinstance(event, ToolCall):
                called = f"[{event.expression} = {'?' if event.output is None else event.output}]"
                print(dim(CONTROL.sub("\ufffd", called)), end=" ", flush=True)
            else:
                print(CONTROL.sub("\ufffd", event), end="", flush=True)

    loop = EngineLoop(engine)
    try:
        loop.admit([generation])
        while not generation.done:
            show()
            loop.step()
    except KeyboardInterrupt:
        loop.cancel(generation)
    show()
    print(flush=True)
    generation.result()  # raises the error, if there was one


def readable_input() -> None:
    """Make standard input text, whatever its bytes; empty if it is closed."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def chat(engine: Engine, tokenizer: Tokenizer, config: Config) -> None:
    """Read and answer until the input ends."""
    print(HELP)
    history, turn = History(tokenizer), 0
    room = engine.max_len - min(config.max_tokens, engine.max_len // 2)
    while True:
        try:
            text = input("\nUser: ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            print()
            return
        word = text.lower()
        if word in ("quit", "exit", "/quit", "/exit"):
            return
        if word == "/help":
            print(HELP)
        elif word in ("clear", "/clear"):
            history = History(tokenizer)
            print(dim("(a new conversation)"))
        elif text:
            tokens, dropped = history.prompt(text, room=room)
            if dropped:
                print(
                    dim(
                        f"(the context of {engine.max_len} tokens is full: dropped the oldest "
                        f"{dropped} turns)"
                    )
                )
            try:
                reply = engine.generation(config.request(tokens, turn=turn))
            except ValueError as error:  # the message alone is too long
                print(dim(f"({error}: say it in fewer words)"))
                continue
            print("\nAssistant: ", end="", flush=True)
            answer(engine, reply)
            history.add(text, reply.tokens)
            turn += 1
            if reply.finish_reason == "length":
                print(dim(f"(cut after {len(reply.tokens)} tokens)"))


def main(config: Config) -> int | None:
    readable_input()
    paths = Paths.from_env()
    start(paths, config)
    engine, model = load_engine(
        paths,
        config.source,
        tag=config.model_tag,
        step=config.step,
        dtype=config.dtype,
        num_slots=1,
        steps_per_dispatch=4,
    )
    if config.prompt is None:
        chat(engine, model.tokenizer, config)
        return None
    tokens, _ = History(model.tokenizer).prompt(config.prompt, room=engine.max_len)
    try:
        reply = engine.generation(config.request(tokens, turn=0))
    except ValueError as error:
        raise UsageError(f"--prompt: {error}") from error
    answer(engine, reply)
    return cli.EXIT_INTERRUPTED if reply.finish_reason == "cancelled" else None


if __name__ == "__main__":
    cli.run(
        main,
        Config,
        prog="scripts.chat_cli",
        description="Chat with a trained model in the terminal.",
    )

"""Chat with a trained model in the terminal.

    python -m scripts.chat_cli                              the newest finetuned model
    python -m scripts.chat_cli -i rl -g d20                 another stage or model
    python -m scripts.chat_cli -p "Why is the sky blue?"    one reply, then exit

The model's calculations are printed as [345+678 = 1023].
"""

from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.cli import LARGEST_SEED, count, flag
from nanochat_jax.devices import EngineFlags, start
from nanochat_jax.infer.request import Sampling
from nanochat_jax.paths import Paths
from nanochat_jax.pretrained import load_engine
from nanochat_jax.serve.terminal import Terminal, make_stdin_readable


@dataclass(frozen=True, kw_only=True)
class Config(EngineFlags):
    prompt: str | None = flag(None, "answer this and exit", short="-p")
    temperature: float = flag(
        0.6, "sampling temperature; 0 is greedy", short="-t", at_least=0, at_most=100
    )
    top_k: int = flag(
        50,
        "sample from the k most likely tokens; 0: from all",
        short="-k",
        at_least=0,
        at_most=10**6,
    )
    max_tokens: int = count(256, "maximum length of a reply in tokens", at_most=2**24)
    seed: int = flag(
        42,
        "random seed; a conversation with the same seed repeats itself",
        at_least=0,
        at_most=LARGEST_SEED,
    )


def main(config: Config) -> int | None:
    make_stdin_readable()
    paths = Paths.from_env()
    start(paths, config)
    engine, model = load_engine(paths, config.source, config, num_slots=1, steps_per_dispatch=4)
    sampling = Sampling(
        temperature=config.temperature,
        top_k=config.top_k,
        max_tokens=config.max_tokens,
        seed=config.seed,
    )
    terminal = Terminal(engine, model.tokenizer, sampling)
    if config.prompt is None:
        terminal.chat()
        return None
    reply = terminal.answer_once(config.prompt)
    return cli.EXIT_INTERRUPTED if reply.finish_reason == "cancelled" else None


if __name__ == "__main__":
    cli.run(
        main,
        Config,
        prog="scripts.chat_cli",
        description="Chat with a trained model in the terminal.",
    )

"""Samples of a base model: greedy continuations of fixed prompts, and unconditioned texts."""

import logging
from collections.abc import Sequence

from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.request import Request
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


def greedy_samples(engine: Engine, tokenizer: Tokenizer, *, max_tokens: int = 16) -> list[str]:
    """Each prompt with its greedy continuation."""
    requests = [
        Request(
            tuple(tokenizer.encode(prompt, prepend=tokenizer.bos_id)),
            max_tokens=max_tokens,
            temperature=0.0,
        )
        for prompt in PROMPTS
    ]
    return [prompt + result.text for prompt, result in zip(PROMPTS, engine.generate(requests))]


def free_samples(
    engine: Engine, tokenizer: Tokenizer, count: int, *, max_tokens: int = 128
) -> list[str]:
    """Texts sampled at temperature 1 from only the beginning-of-sequence token."""
    requests = [
        Request((tokenizer.bos_id,), max_tokens=max_tokens, temperature=1.0, seed=i)
        for i in range(count)
    ]
    return [result.text for result in engine.generate(requests)]


def sample_items(greedy: Sequence[str], free: Sequence[str] = ()) -> list[dict[str, str]]:
    """Samples for the report. Also logs them."""
    for text in (*greedy, *free):
        log.info("  %s", text.replace("\n", " "))
    return [
        {f"sample {i}": text for i, text in enumerate(greedy)},
        {f"unconditioned sample {i}": text for i, text in enumerate(free)},
    ]

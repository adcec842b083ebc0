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


def greedy_samples(engine: Engine, tokenizer: Tokenizer) -> list[str]:
    """Each prompt with its greedy continuation of 16 tokens."""
    prompts = [tuple(tokenizer.encode(prompt, prepend=tokenizer.bos_id)) for prompt in PROMPTS]
    requests = [Request(prompt, max_tokens=16, temperature=0.0) for prompt in prompts]
    return [prompt + result.text for prompt, result in zip(PROMPTS, engine.generate(requests))]


def free_samples(engine: Engine, tokenizer: Tokenizer, count: int) -> list[str]:
    """Texts of 128 tokens sampled at temperature 1 from only the beginning-of-sequence token."""
    prompt = (tokenizer.bos_id,)
    requests = [Request(prompt, max_tokens=128, temperature=1.0, seed=i) for i in range(count)]
    return [result.text for result in engine.generate(requests)]


def sample_items(greedy: Sequence[str], free: Sequence[str] = ()) -> list[dict[str, str]]:
    """Samples for the report. Also logs them."""
    for text in (*greedy, *free):
        log.info("  %s", text.replace("\n", " "))
    return [
        {f"sample {i}": text for i, text in enumerate(greedy)},
        {f"unconditioned sample {i}": text for i, text in enumerate(free)},
    ]

"""Samples of a base model: greedy continuations of fixed prompts, and unconditioned texts."""

import logging
from collections.abc import Sequence

from nanochat_jax.checkpoint import Loaded
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.request import Request
from nanochat_jax.model.compute import Compute

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


def _generate(loaded: Loaded, requests: list[Request], compute: Compute) -> list[str]:
    engine = Engine(
        loaded.config, loaded.params, loaded.tokenizer, num_slots=len(requests), compute=compute
    )
    return [result.text for result in engine.generate(requests)]


def greedy_samples(loaded: Loaded, *, compute: Compute, max_tokens: int = 16) -> list[str]:
    """Each prompt with its greedy continuation."""
    encode, bos = loaded.tokenizer.encode, loaded.tokenizer.bos_id
    requests = [
        Request(tuple(encode(prompt, prepend=bos)), max_tokens=max_tokens, temperature=0.0)
        for prompt in PROMPTS
    ]
    return [prompt + text for prompt, text in zip(PROMPTS, _generate(loaded, requests, compute))]


def free_samples(
    loaded: Loaded, count: int, *, compute: Compute, max_tokens: int = 128
) -> list[str]:
    """Texts sampled at temperature 1 from only the beginning-of-sequence token."""
    requests = [
        Request((loaded.tokenizer.bos_id,), max_tokens=max_tokens, temperature=1.0, seed=i)
        for i in range(count)
    ]
    return _generate(loaded, requests, compute)


def sample_items(greedy: Sequence[str], free: Sequence[str] = ()) -> list[dict[str, str]]:
    """Samples for the report. Also logs them."""
    for text in (*greedy, *free):
        log.info("  %s", text.replace("\n", " "))
    return [
        {f"sample {i}": text for i, text in enumerate(greedy)},
        {f"unconditioned sample {i}": text for i, text in enumerate(free)},
    ]

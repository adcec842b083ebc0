"""Log-probabilities of given tokens, and the most likely tokens at each position.

For prompts that are scored, not continued, and for the alternatives to a reply's tokens. The
sequences pass through the model once, without a KV cache and apart from the engine's slots.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nanochat_jax.infer.decode import DecodeConfig
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.padding import by_padded_length, padded_length
from nanochat_jax.infer.sampling import most_likely
from nanochat_jax.model.gpt import forward, softcap
from nanochat_jax.model.weights import Params

MOST_TOP = 20  # alternatives per position
ROWS = 8  # sequences of one batch, or one if there is only one ...
BATCH_TOKENS = 16384  # ... or if a batch would be longer, padding included
CHUNK_ELEMENTS = 2**24  # float32 logits in memory at once: 64 MiB


@dataclass(frozen=True)
class TokenScores:
    """Natural log-probabilities of a sequence of n tokens, before temperature, top-k and top-p.

    Attributes:
        logprobs: [n] float32 of each token after the tokens before it; NaN for the first.
        top_ids: [n + 1, k] int32, the k most likely tokens at each position, most likely first. The
            last position is the one after the sequence. The first position has no prediction: its
            ids are -1.
        top_logprobs: [n + 1, k] float32 of `top_ids`.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the indices of sequences to score together, shortest first."""
    for length, indices in by_padded_length(sequences):
        rows = ROWS if ROWS * length <= BATCH_TOKENS else 1
        yield from (indices[start : start + rows] for start in range(0, len(indices), rows))


def score_tokens(engine: Engine, batch: Sequence[Sequence[int]], top: int) -> list[TokenScores]:
    """Score the sequences of one of `batches`, with the `top` most likely tokens, at most 20.

    Thread-safe. Raises ValueError for a sequence that is empty, longer than the engine's context or
    has ids outside the vocabulary.
    """
    for sequence in batch:
        check_tokens(engine, sequence)
    rows = 1 if len(batch) == 1 else ROWS
    tokens = np.zeros((rows, padded_length(max(map(len, batch)))), np.int32)
    for row, sequence in zip(tokens, batch):
        row[: len(sequence)] = sequence
    # two sizes, because each is compiled
    count = 1 if top <= 1 else MOST_TOP
    scores = _score(engine.params, tokens, count=count, static=engine.static)
    logprobs, ids, top_logprobs = map(np.asarray, scores)
    return [
        TokenScores(
            np.append(np.float32(np.nan), logprobs[row, : len(sequence) - 1]),
            np.pad(ids[row, : len(sequence), :top], ((1, 0), (0, 0)), constant_values=-1),
            np.pad(top_logprobs[row, : len(sequence), :top], ((1, 0), (0, 0))),
        )
        for row, sequence in enumerate(batch)
    ]


def check_tokens(engine: Engine, sequence: Sequence[int]) -> None:
    """Raise ValueError as `score_tokens`."""
    if not sequence:
        raise ValueError("the prompt has no tokens")
    if len(sequence) > engine.max_len:
        raise ValueError(
            f"a sequence of {len(sequence)} tokens does not fit in the context of {engine.max_len}"
        )
    engine.check_ids(sequence)


@functools.partial(jax.jit, static_argnames=("count", "static"))
def _score(
    params: Params, tokens: Array, *, count: int, static: DecodeConfig
) -> tuple[Array, Array, Array]:
    """Predictions after each of tokens [B, T].

    Returns the log-probability of the next token [B, T], and the most likely ids and their
    log-probabilities [B, T, count]. `params` are in the form of `decode.split_layers`.
    """
    config = static.config
    # a loop over the layers would stack their weights in every call
    hidden, _ = forward(params, tokens, config, static.compute.replace(scan=False))
    positions = tokens.size
    chunk = min(positions, max(1, CHUNK_ELEMENTS // config.vocab_size))
    padding = -positions % chunk

    def chunked(x: Array) -> Array:
        flat = x.reshape(positions, *x.shape[2:])
        flat = jnp.pad(flat, ((0, padding),) + ((0, 0),) * (flat.ndim - 1))
        return flat.reshape(-1, chunk, *flat.shape[1:])

    def score(inputs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        hidden, targets = inputs
        logits = softcap(params["lm_head"].columns(hidden), config=config)  # [V, chunk]
        log_z = jax.nn.logsumexp(logits, axis=0)
        values, ids = most_likely(logits, count)
        return logits[targets, jnp.arange(chunk)] - log_z, ids, values - log_z[:, None]

    scores = lax.map(score, (chunked(hidden), chunked(jnp.roll(tokens, -1, axis=1))))

    def unchunked(x: Array) -> Array:
        flat = x.reshape(-1, *x.shape[2:])[:positions]
        return flat.reshape(*tokens.shape, *flat.shape[1:])

    logprobs, ids, top = map(unchunked, scores)
    return logprobs, ids, top

"""Log-likelihoods of token spans, for many examples at a time.

The prompts of one example differ only near their ends (a question's choices, after ten solved
questions). So the shared prefix is computed once into a KV cache, and the continuations are scored
over it in order, each overwriting the one before. Examples of similar length share a batch, and
lengths are padded to a few values, so few programs are compiled.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanochat_jax.infer.padding import padded_length
from nanochat_jax.model.compute import REFERENCE, Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.gpt import KVCache, forward, init_cache
from nanochat_jax.model.loss import target_scores
from nanochat_jax.model.sharding import data_size, replicated, spread_rows
from nanochat_jax.model.weights import Params

BLOCK = 128  # unit of cache lengths
MOST_TOKENS = 4096  # maximum tokens of a row per forward pass; a multiple of BLOCK
# Batches of longer rows have fewer rows, so that their caches fit in memory.
ROW_LENGTH = 2048
WINDOW = 2048  # examples buffered to sort by length

Key = TypeVar("Key")


@dataclass(frozen=True)
class Row:
    """One prompt: `tokens[start:end]` is scored, 1 <= start."""

    tokens: np.ndarray  # [n] int32
    start: int
    end: int


@dataclass(frozen=True)
class RowScore:
    mean_nll: float  # of the span, in nats; nan if it is empty (one choice begins another)
    all_argmax: bool  # every token of the span is the most likely one


def common_length(arrays: Sequence[np.ndarray]) -> int:
    """Length of the common prefix of `arrays`."""
    shortest = min(map(len, arrays))
    differs = np.any([tokens[:shortest] != arrays[0][:shortest] for tokens in arrays[1:]], axis=0)
    return int(differs.argmax()) if np.any(differs) else shortest


def rows_for(device_batch_size: int) -> int:
    """`Scorer.num_rows` if a device can hold `device_batch_size` rows.

    An eighth of it on a CPU, so that the scores fit in its caches.
    """
    return max(1, device_batch_size // 8) if jax.default_backend() == "cpu" else device_batch_size


@dataclass(frozen=True)
class _Example:
    """The rows of an example and the length of their shared prefix.

    The prefix ends before the token that predicts the first scored one.
    """

    key: Any
    rows: Sequence[Row]
    shared: int

    @classmethod
    def of(cls, key: Any, rows: Sequence[Row]) -> "_Example":
        return cls(
            key,
            rows,
            min(common_length([row.tokens for row in rows]), *(row.start - 1 for row in rows)),
        )

    @property
    def longest_rest(self) -> int:
        return max(row.end for row in self.rows) - self.shared

    @property
    def cost(self) -> tuple[int, int, int]:
        """Sort key that groups examples with similar padded lengths and equal numbers of rows."""
        return _shared_length(self.shared), len(self.rows), self.longest_rest


def _shared_length(length: int) -> int:
    """Padded length of a shared prefix. Finer than other lengths, as most of the work is here."""
    return padded_length(length, BLOCK, steps=4)


def _cache_length(length: int) -> int:
    return padded_length(length, BLOCK, steps=1)


@functools.partial(jax.jit, static_argnames=("length", "mesh"))
def _grow(cache: KVCache, *, length: int, mesh: Mesh | None) -> KVCache:
    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))

    return _shard(cache._replace(k=tuple(map(pad, cache.k)), v=tuple(map(pad, cache.v))), mesh)


def _shard(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """Shard rows over the data axis, and heads over the model axis if it divides their number.

    Keys and values are [B, K, S, h].
    """
    if mesh is None:
        return cache

    def shard(x: Array) -> Array:
        heads = "model" if x.ndim == 4 and x.shape[1] % mesh.shape["model"] == 0 else None
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(mesh, PartitionSpec("data", *[heads] * (x.ndim > 1)))
        )

    return jax.tree.map(shard, cache)


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _begin(
    params: Params, tokens: Array, valid: Array, *, config: GPTConfig, compute: Compute
) -> KVCache:
    """A cache of the first valid [B] of tokens [B, T].

    The last layer's output is unused, so XLA does not compute it.
    """
    cache = _shard(
        init_cache(config, tokens.shape[0], tokens.shape[1], compute.dtype), compute.mesh
    )
    cache = forward(params, tokens, config, compute, cache=cache, valid=valid, fresh=True)[1]
    return _shard(cache, compute.mesh)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames=("config", "compute"))
def _extend(
    params: Params,
    cache: KVCache,
    tokens: Array,
    valid: Array,
    *,
    config: GPTConfig,
    compute: Compute,
) -> KVCache:
    """Append the first valid [B] of tokens [B, T]."""
    return _shard(
        forward(params, tokens, config, compute, cache=cache, valid=valid)[1], compute.mesh
    )


@functools.partial(jax.jit, donate_argnames=("k", "v"), static_argnames=("config", "compute"))
def _score(
    params: Params,
    k: tuple[Array, ...],
    v: tuple[Array, ...],
    rest: tuple[Array, Array],
    span: tuple[Array, Array, Array],
    *,
    config: GPTConfig,
    compute: Compute,
) -> tuple[Array, Array, tuple[Array, ...], tuple[Array, ...]]:
    """Score tokens over a cache: keys `k`, values `v`, and `rest` (length and previous embedding).

    `span` is tokens [B, U], first [B] and end [B]: tokens first..end-1 of each row are scored,
    first >= 1. Returns the summed negative log-likelihood [B] float32, whether all scored tokens
    are the most likely ones [B], and the cache buffers, whose entries beyond the cache length may
    be overwritten.
    """
    tokens, first, end = span
    hidden, cache = forward(params, tokens, config, compute, cache=KVCache(k, v, *rest), valid=end)
    cache = _shard(cache, compute.mesh)
    positions = jnp.arange(tokens.shape[1]) + 1  # position p predicts token p + 1
    inside = (positions >= first[:, None]) & (positions < end[:, None])  # [B, U]
    targets = jnp.where(inside, jnp.roll(tokens, -1, axis=1), -1)
    nll, is_best = target_scores(params, hidden, targets, config, compute)
    totals = nll.sum(axis=1), (is_best | ~inside).all(axis=1)
    if compute.mesh is not None:  # so that every process can read all rows
        totals = jax.lax.with_sharding_constraint(totals, replicated(compute.mesh))
    return *totals, cache.k, cache.v


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores examples with a model.

    Attributes:
      num_rows: examples per batch on each device of the data axis; fewer if longer than
        `ROW_LENGTH`.
      compute: rows are sharded over the data axis of its mesh.
    """

    config: GPTConfig
    params: Params
    num_rows: int = 8
    compute: Compute = REFERENCE

    def __call__(
        self, examples: Iterable[tuple[Key, Sequence[Row]]]
    ) -> Iterator[tuple[Key, list[RowScore]]]:
        """(key, rows) to (key, score of each row), in another order.

        A batch is read after the next one is dispatched, so the device computes while the host
        tokenizes.
        """
        pending: tuple[list[_Example], list[tuple[Array, Array]]] | None = None
        for batch in self._batches(examples):
            scores = self._dispatch(batch)
            if pending:
                yield from _read(*pending)
            pending = batch, scores
        if pending:
            yield from _read(*pending)

    def _batches(self, examples: Iterable[tuple[Key, Sequence[Row]]]) -> Iterator[list[_Example]]:
        source = (_Example.of(key, rows) for key, rows in examples)
        while window := list(islice(source, WINDOW)):
            window.sort(key=lambda example: example.cost)
            while window:
                count = self._batch_rows(window[: self._batch_rows(window[:1])])
                yield window[:count]
                del window[:count]

    def _batch_rows(self, batch: Sequence[_Example]) -> int:
        """Number of rows of a batch with these examples."""
        longest = max(_cache_length(example.shared + example.longest_rest) for example in batch)
        mesh = self.compute.mesh
        devices = 1 if mesh is None else data_size(mesh)
        return devices * max(1, self.num_rows * ROW_LENGTH // max(ROW_LENGTH, longest))

    def _sharded(self, array: np.ndarray) -> Array | np.ndarray:
        mesh = self.compute.mesh
        return array if mesh is None else spread_rows(mesh, array)

    def _dispatch(self, batch: Sequence[_Example]) -> list[tuple[Array, Array]]:
        """(summed negative log-likelihood [B], all_argmax [B]) of each choice, in order."""
        options = {"config": self.config, "compute": self.compute}
        count = self._batch_rows(batch)
        shared = np.zeros(count, np.int32)
        shared[: len(batch)] = [example.shared for example in batch]
        size = padded_length(max(example.longest_rest for example in batch), 8, steps=1)
        longest = int(shared.max())
        for at in range(0, max(1, longest), MOST_TOKENS):
            tokens = np.zeros((count, min(MOST_TOKENS, _shared_length(longest - at))), np.int32)
            for row, example in enumerate(batch):
                piece = example.rows[0].tokens[at : min(at + MOST_TOKENS, example.shared)]
                tokens[row, : len(piece)] = piece
            new = self._sharded(tokens), self._sharded(np.clip(shared - at, 0, MOST_TOKENS))
            if at == 0:
                cache = _begin(self.params, *new, **options)
            else:
                cache = _extend(
                    self.params, self._reserve(cache, at + MOST_TOKENS), *new, **options
                )
        cache = self._reserve(cache, longest + size)

        k, v, rest, sums = cache.k, cache.v, (cache.length, cache.prev_embedding), []
        for choice in range(max(len(example.rows) for example in batch)):
            tokens, span = np.zeros((count, size), np.int32), np.zeros((count, 2), np.int32)
            for row, example in enumerate(batch):
                if choice < len(example.rows):
                    given = example.rows[choice]
                    piece = given.tokens[example.shared : given.end]
                    tokens[row, : len(piece)] = piece
                    span[row] = given.start - example.shared, given.end - example.shared
            sharded = tuple(map(self._sharded, (tokens, *span.T)))
            *totals, k, v = _score(self.params, k, v, rest, sharded, **options)
            sums.append(totals)
        return sums

    def _reserve(self, cache: KVCache, length: int) -> KVCache:
        target = _cache_length(length)
        if cache.k[0].shape[2] >= target:
            return cache
        return _grow(cache, length=target, mesh=self.compute.mesh)


def _read(
    batch: Sequence[_Example], sums: Sequence[tuple[Array, Array]]
) -> Iterator[tuple[Any, list[RowScore]]]:
    sums = jax.device_get(sums)
    for i, example in enumerate(batch):
        scores = []
        for row, (nll, all_argmax) in zip(example.rows, sums, strict=False):
            length = row.end - row.start
            scores.append(
                RowScore(float(nll[i]) / length if length else math.nan, bool(all_argmax[i]))
            )
        yield example.key, scores

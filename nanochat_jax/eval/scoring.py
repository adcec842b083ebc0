"""How likely a model finds spans of tokens, many examples at a time.

The prompts of one example differ only near their ends (the choices of a question, after ten solved ones), so what they
share is computed once: it goes through the model into a KV cache, and each continuation is then scored over that cache,
in the same slots as the one before it. Examples of similar length share a batch, and all lengths are padded to a few: a
few programs serve prompts of any length.
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

from nanochat_jax.config import GPTConfig
from nanochat_jax.eval.batching import bucket
from nanochat_jax.gpt import KVCache, Params, forward, init_cache, unembed
from nanochat_jax.infer.sampling import first_argmax
from nanochat_jax.kernels import forward_options
from nanochat_jax.sharding import data_size, replicated, spread_rows

BLOCK = 128  # the unit of lengths of the cache
MOST_TOKENS = 4096  # of a row that go through the model at once; a multiple of BLOCK
ROW_LENGTH = 2048  # of longer rows a batch has fewer, since their caches would not fit where these do
WINDOW = 2048  # examples held back to be sorted by length
LOGITS_BYTES = 256 << 20  # upper bound of the float32 logits that exist at one time

Key = TypeVar("Key")


@dataclass(frozen=True)
class Row:
    """One prompt: `tokens[start:end]` is what is scored, 1 <= start."""

    tokens: np.ndarray  # [n] int32
    start: int
    end: int


@dataclass(frozen=True)
class RowScore:
    mean_nll: float  # of the span, in nats; nan when it is empty (one choice begins another)
    all_argmax: bool  # every token of the span is the model's first choice


def common_length(arrays: Sequence[np.ndarray]) -> int:
    """How many tokens all of `arrays` begin with alike."""
    shortest = min(map(len, arrays))
    differs = np.any([tokens[:shortest] != arrays[0][:shortest] for tokens in arrays[1:]], axis=0)
    return int(differs.argmax()) if np.any(differs) else shortest


def rows_for(device_batch_size: int) -> int:
    """`Scorer.num_rows` where a device can hold `device_batch_size` rows; few on a CPU, whose caches then hold their scores."""
    return max(1, device_batch_size // 8) if jax.default_backend() == "cpu" else device_batch_size


@dataclass(frozen=True)
class _Example:
    """The rows of an example, the tokens that they share cut off: the last of them predicts the first that is scored."""

    key: Any
    rows: Sequence[Row]
    shared: int

    @classmethod
    def of(cls, key: Any, rows: Sequence[Row]) -> "_Example":
        return cls(key, rows, min(common_length([row.tokens for row in rows]), *(row.start - 1 for row in rows)))

    @property
    def longest_rest(self) -> int:
        return max(row.end for row in self.rows) - self.shared

    @property
    def cost(self) -> tuple[int, int, int]:
        """What sorts examples so that those of a batch are padded little: each then has as many rows, too."""
        return _shared_length(self.shared), len(self.rows), self.longest_rest


def _shared_length(length: int) -> int:
    """Padded length of what rows share. Most of the work is here, so in finer steps than the other lengths."""
    return bucket(length, BLOCK, steps=4)


def _cache_length(length: int) -> int:
    return bucket(length, BLOCK, steps=1)


@functools.partial(jax.jit, static_argnames=("length", "mesh"))
def _grow(cache: KVCache, *, length: int, mesh: Mesh | None) -> KVCache:
    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))

    return _spread(cache._replace(k=tuple(map(pad, cache.k)), v=tuple(map(pad, cache.v))), mesh)


def _spread(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """Rows over the data axis; keys and values [B, K, S, h] by heads over the model axis too, where the number divides."""
    if mesh is None:
        return cache

    def place(x: Array) -> Array:
        heads = "model" if x.ndim == 4 and x.shape[1] % mesh.shape["model"] == 0 else None
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data", *[heads] * (x.ndim > 1))))

    return jax.tree.map(place, cache)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def _begin(params: Params, tokens: Array, valid: Array, *, config: GPTConfig, dtype: Any, mesh: Mesh | None) -> KVCache:
    """A cache of the first valid [B] of tokens [B, T]. The last layer's output is not asked for, so it is not computed."""
    cache = _spread(init_cache(config, tokens.shape[0], tokens.shape[1], dtype), mesh)
    how = forward_options(config, mesh, dtype=dtype, length=tokens.shape[1])
    cache = forward(params, tokens, config=config, compute_dtype=dtype, cache=cache, valid=valid, fresh=True, **how)[1]
    return _spread(cache, mesh)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames=("config", "dtype", "mesh"))
def _extend(params: Params, cache: KVCache, tokens: Array, valid: Array, *, config: GPTConfig, dtype: Any, mesh: Mesh | None
            ) -> KVCache:
    """Append the first valid [B] of tokens [B, T]."""
    return _spread(forward(params, tokens, config=config, compute_dtype=dtype, cache=cache, valid=valid)[1], mesh)


@functools.partial(jax.jit, donate_argnames=("k", "v"), static_argnames=("config", "dtype", "mesh"))
def _score(params: Params, k: tuple[Array, ...], v: tuple[Array, ...], length: Array, prev_embedding: Array,
           tokens: Array, first: Array, end: Array, *, config: GPTConfig, dtype: Any, mesh: Mesh | None
           ) -> tuple[Array, Array, tuple[Array, ...], tuple[Array, ...]]:
    """Score tokens [B, U] over a cache: those at first..end-1 (each [B], in tokens; first at least 1).

    Returns the summed negative log-likelihood [B] float32, whether all of them are the argmax [B], and the buffers of
    the cache, whose slots from `length` on may be overwritten.
    """
    batch, size = tokens.shape
    cache = KVCache(k, v, length, prev_embedding)
    hidden, cache = forward(params, tokens, config=config, compute_dtype=dtype, cache=cache, valid=end)
    cache = _spread(cache, mesh)
    affordable = max(1, LOGITS_BYTES // (4 * batch * config.vocab_size))
    chunk = min(size, 1 << (affordable.bit_length() - 1))
    targets = jnp.roll(tokens, -1, axis=1)  # position p predicts token p + 1; the last one is outside every span

    def add_chunk(totals: tuple[Array, Array], at: Array) -> tuple[tuple[Array, Array], None]:
        nll, all_argmax = totals
        positions = at + jnp.arange(chunk) + 1
        inside = (positions >= first[:, None]) & (positions < end[:, None])  # [B, chunk]
        target = jax.lax.dynamic_slice_in_dim(targets, at, chunk, axis=1)
        logits = unembed(params, jax.lax.dynamic_slice_in_dim(hidden, at, chunk, axis=1), config=config)
        losses = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        hits = first_argmax(logits.reshape(-1, config.vocab_size)).reshape(target.shape) == target
        return (nll + jnp.where(inside, losses, 0.0).sum(axis=1), all_argmax & (hits | ~inside).all(axis=1)), None

    totals = (jnp.zeros(batch, jnp.float32), jnp.ones(batch, bool))
    totals, _ = jax.lax.scan(add_chunk, totals, jnp.arange(0, size, chunk))
    if mesh is not None:  # so that every process can read all rows
        totals = jax.lax.with_sharding_constraint(totals, replicated(mesh))
    return *totals, cache.k, cache.v


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores examples with a model.

    Attributes:
        num_rows: examples of a batch on each device of the data axis; fewer of those longer than `ROW_LENGTH`.
        mesh: spreads the rows over its data axis; None: wherever the parameters are.
    """

    config: GPTConfig
    params: Params
    num_rows: int = 8
    mesh: Mesh | None = None
    compute_dtype: Any = jnp.float32

    def __call__(self, examples: Iterable[tuple[Key, Sequence[Row]]]) -> Iterator[tuple[Key, list[RowScore]]]:
        """(key, rows) to (key, score of each row), in another order. Batch after batch is read when the next one is
        dispatched: the device works while the host tokenizes."""
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
        """How many rows a batch that holds these has."""
        longest = max(_cache_length(example.shared + example.longest_rest) for example in batch)
        devices = 1 if self.mesh is None else data_size(self.mesh)
        return devices * max(1, self.num_rows * ROW_LENGTH // max(ROW_LENGTH, longest))

    def _place(self, array: np.ndarray) -> Array | np.ndarray:
        return array if self.mesh is None else spread_rows(self.mesh, array)

    def _dispatch(self, batch: Sequence[_Example]) -> list[tuple[Array, Array]]:
        """Sums [B] of each continuation in turn."""
        options = {"config": self.config, "dtype": self.compute_dtype, "mesh": self.mesh}
        count = self._batch_rows(batch)
        shared = np.zeros(count, np.int32)
        shared[: len(batch)] = [example.shared for example in batch]
        size = bucket(max(example.longest_rest for example in batch), 8, steps=1)
        longest = int(shared.max())
        for at in range(0, max(1, longest), MOST_TOKENS):
            tokens = np.zeros((count, min(MOST_TOKENS, _shared_length(longest - at))), np.int32)
            for row, example in enumerate(batch):
                piece = example.rows[0].tokens[at : min(at + MOST_TOKENS, example.shared)]
                tokens[row, : len(piece)] = piece
            new = self._place(tokens), self._place(np.clip(shared - at, 0, MOST_TOKENS))
            if at == 0:
                cache = _begin(self.params, *new, **options)
            else:
                cache = _extend(self.params, self._reserve(cache, at + MOST_TOKENS), *new, **options)
        cache = self._reserve(cache, longest + size)

        (k, v, length, prev_embedding), sums = cache, []
        for choice in range(max(len(example.rows) for example in batch)):
            tokens, span = np.zeros((count, size), np.int32), np.zeros((count, 2), np.int32)
            for row, example in enumerate(batch):
                if choice < len(example.rows):
                    given = example.rows[choice]
                    piece = given.tokens[example.shared : given.end]
                    tokens[row, : len(piece)] = piece
                    span[row] = given.start - example.shared, given.end - example.shared
            *totals, k, v = _score(self.params, k, v, length, prev_embedding, *map(self._place, (tokens, *span.T)), **options)
            sums.append(totals)
        return sums

    def _reserve(self, cache: KVCache, length: int) -> KVCache:
        target = _cache_length(length)
        return cache if cache.k[0].shape[2] >= target else _grow(cache, length=target, mesh=self.mesh)


def _read(batch: Sequence[_Example], sums: Sequence[tuple[Array, Array]]) -> Iterator[tuple[Any, list[RowScore]]]:
    sums = jax.device_get(sums)
    for i, example in enumerate(batch):
        scores = []
        for row, (nll, all_argmax) in zip(example.rows, sums, strict=False):
            length = row.end - row.start
            scores.append(RowScore(float(nll[i]) / length if length else math.nan, bool(all_argmax[i])))
        yield example.key, scores

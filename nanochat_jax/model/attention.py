"""Causal attention with an optional window: of complete sequences, and of new tokens over a KV
cache.

The reference is in XLA, with scores and softmax in float32. It splits sequences into blocks of
queries and computes only the keys that each block can see. This skips half the work of causal
attention and most of a windowed one's. The hand-written gradient saves none of the [T, S] weights.
`self_attention` chooses between the reference and the fused kernels of `kernels.py`.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from nanochat_jax.errors import UsageError
from nanochat_jax.model import kernels
from nanochat_jax.model.compute import Compute, device_of
from nanochat_jax.model.fast import SAVED, transpose

QUERY_BLOCK = 128  # fewest queries of a block; the last block may be smaller
MOST_BLOCKS = 16  # each is compiled separately

KERNELS = {
    "splash": (kernels.splash_refuses, kernels.splash_attention),
    "cudnn": (kernels.cudnn_refuses, kernels.cudnn_attention),
}


def self_attention(q: Array, k: Array, v: Array, *, window: int | None, compute: Compute) -> Array:
    """Causal attention [B, T, H, h] of complete sequences with the kernel of `compute`.

    q [B, T, H, h]; k, v [B, T, K, h]. Raises `UsageError` if a kernel requested by name cannot run.
    """
    if callable(compute.attention):
        return compute.attention(q, k, v, window=window)
    kernel = choose_kernel(compute, q)
    if kernel == "xla":
        return causal_attention(q, k, v, window=window)
    return KERNELS[kernel][1](q, k, v, window=window, mesh=compute.mesh)


def choose_kernel(compute: Compute, q: Array | jax.ShapeDtypeStruct) -> str:
    """The kernel for queries like q [B, T, H, h]: a name in `KERNELS`, or "xla".

    Raises `UsageError` if a kernel requested by name cannot run.
    """
    device = device_of(compute.mesh)
    for name, (refuses, _) in KERNELS.items():
        reason = refuses(q, device)
        if compute.attention == name and reason:
            raise UsageError(f"`attention={name}`: {reason}; choose xla or auto")
        if compute.attention == name or (compute.attention == "auto" and not reason):
            return name
    return "xla"


def check_attention(compute: Compute, *, length: int, head_dim: int) -> None:
    """Raise `UsageError` if a kernel requested by name cannot run rows of `length` tokens."""
    choose_kernel(compute, jax.ShapeDtypeStruct((1, length, 1, head_dim), compute.dtype))


def _attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """[B, T, H, h] of q [B, T, H, h], k and v [B, K, S, h].

    The mask broadcasts to [B, 1, 1, T, S].
    """
    batch, q_len, n_head, head_dim = q.shape
    n_kv_head, groups = k.shape[1], n_head // k.shape[1]
    grouped = q.reshape(batch, q_len, n_kv_head, groups, head_dim).transpose(0, 2, 3, 1, 4)
    # One axis for groups and queries: XLA's CPU matmul is up to three times slower with two.
    queries = grouped.reshape(batch, n_kv_head, groups * q_len, head_dim).astype(k.dtype)
    scores = _einsum("bkqh,bksh->bkqs", queries, k)
    scores = scores.reshape(batch, n_kv_head, groups, q_len, -1)
    scores = jnp.where(mask, scores * (1.0 / math.sqrt(head_dim)), -jnp.inf)
    scores = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = (scores / scores.sum(axis=-1, keepdims=True)).astype(v.dtype)
    out = _einsum("bkqs,bksh->bkqh", weights.reshape(batch, n_kv_head, groups * q_len, -1), v)
    out = out.reshape(batch, n_kv_head, groups, q_len, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape).astype(q.dtype)


def _visible(q_positions: Array, k_positions: Array, window: int | None) -> Array:
    """True where a key is 0 to `window` positions behind the query: window + 1 keys."""
    distance = q_positions[..., :, None] - k_positions[..., None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance <= window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _causal(q: Array, k: Array, v: Array, window: int | None) -> Array:
    return _causal_fwd(q, k, v, window)[0]


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice, Array]]:
    """Blocks of queries: their slice, the slice of keys they can see, and the mask [t, s]."""
    size = max(QUERY_BLOCK, length // MOST_BLOCKS)
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if window is None else max(0, start - window)
        mask = _visible(jnp.arange(start, stop), jnp.arange(first, stop), window)
        yield slice(start, stop), slice(first, stop), mask


def _by_head(x: Array, n_kv_head: int) -> Array:
    """[B, T, H, h] -> [B, K, G, T, h]: G query heads per key/value head."""
    batch, length, n_head, head_dim = x.shape
    grouped = x.reshape(batch, length, n_kv_head, n_head // n_kv_head, head_dim)
    return grouped.transpose(0, 2, 3, 1, 4)


def _by_position(x: Array, like: Array) -> Array:
    return x.transpose(0, 3, 1, 2, 4).reshape(like.shape).astype(like.dtype)


def _einsum(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _weights(q: Array, k_columns: Array, shift: Array, mask: Array) -> Array:
    """exp(scores - shift) [B, K, G, t, s] where the mask is true.

    q [B, K, G, t, h], k_columns [B, K, h, s].
    """
    scores = _einsum("bkgth,bkhs->bkgts", q, k_columns) / math.sqrt(q.shape[-1])
    return jnp.where(mask, jnp.exp(scores - shift[..., None]), 0.0)


def _causal_fwd(q: Array, k: Array, v: Array, window: int | None) -> tuple[Array, tuple]:
    queries, keys, values = (_by_head(x, k.shape[2]) for x in (q, k, v))
    k_columns, values = transpose(keys[:, :, 0]), values[:, :, 0]
    norm = [jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in (queries, keys)]
    # By Cauchy-Schwarz, no score exceeds it.
    shift = norm[0] * norm[1].max(axis=-1, keepdims=True) / math.sqrt(q.shape[-1])
    parts, log_sum = [], []
    for rows, columns, mask in _blocks(q.shape[1], window):
        weights = _weights(queries[..., rows, :], k_columns[..., columns], shift[..., rows], mask)
        total = weights.sum(axis=-1)
        summed = _einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), values[:, :, columns])
        parts.append(summed / total[..., None])
        log_sum.append(jnp.log(total) + shift[..., rows])
    out = checkpoint_name(_by_position(jnp.concatenate(parts, axis=3), q), SAVED)
    return out, (q, k, v, out, checkpoint_name(jnp.concatenate(log_sum, axis=3), SAVED))


def _causal_bwd(window: int | None, residuals: tuple, d_out: Array) -> tuple[Array, Array, Array]:
    """The gradient.

    Recomputes the weights from the log-sum-exp (FlashAttention, Dao et al., 2022).
    """
    q, k, v, out, log_sum = residuals
    n_kv_head, scale = k.shape[2], 1.0 / math.sqrt(q.shape[-1])
    queries, outs, d_outs = (_by_head(x, n_kv_head) for x in (q, out, d_out))
    keys, values = (_by_head(x, n_kv_head)[:, :, 0] for x in (k, v))
    delta = (outs.astype(jnp.float32) * d_outs.astype(jnp.float32)).sum(axis=-1)
    k_columns, v_columns, q_columns, d_out_columns = map(transpose, (keys, values, queries, d_outs))
    d_q, d_k, d_v = [], *(jnp.zeros(x.shape, jnp.float32) for x in (k_columns, v_columns))
    for rows, columns, mask in _blocks(q.shape[1], window):
        weights = _weights(queries[..., rows, :], k_columns[..., columns], log_sum[..., rows], mask)
        d_weights = _einsum("bkgth,bkhs->bkgts", d_outs[..., rows, :], v_columns[..., columns])
        d_scores = (scale * weights * (d_weights - delta[..., rows, None])).astype(q.dtype)
        d_q.append(_einsum("bkgts,bksh->bkgth", d_scores, keys[:, :, columns]))
        from_scores = _einsum("bkght,bkgts->bkghs", q_columns[..., rows], d_scores).sum(axis=2)
        from_weights = _einsum(
            "bkght,bkgts->bkghs", d_out_columns[..., rows], weights.astype(q.dtype)
        )
        d_k = d_k.at[..., columns].add(from_scores)
        d_v = d_v.at[..., columns].add(from_weights.sum(axis=2))
    d_k, d_v = (x.transpose(0, 3, 1, 2).astype(like.dtype) for x, like in ((d_k, k), (d_v, v)))
    return _by_position(jnp.concatenate(d_q, axis=3), q), d_k, d_v


_causal.defvjp(_causal_fwd, _causal_bwd)


def causal_attention(q: Array, k: Array, v: Array, *, window: int | None) -> Array:
    """The reference: [B, T, H, h] of q [B, T, H, h], k and v [B, T, K, h], H a multiple of K.

    |q| |k| / sqrt(h) must be below 40 (`config.LARGEST_SCORE`) for all queries and keys, as it is
    after QK norm. Beyond that the weights underflow.
    """
    return _causal(q, k, v, window)


def cached_attention(
    q: Array, k: Array, v: Array, positions: Array, *, window: int | None
) -> Array:
    """Attention of new tokens over a cache that already holds their keys: [B, T, H, h].

    q [B, T, H, h] at positions [B, T]; k, v [B, K, S, h], where index s holds position s. Entries
    after a query's position (right padding, or an earlier sequence's) are masked.
    """
    mask = _visible(positions, jnp.arange(k.shape[2])[None], window)[:, None, None]
    return _attend(q, k, v, mask)

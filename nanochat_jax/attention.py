"""Causal attention with an optional window, for training (no cache) and for decoding (over a KV cache).

Reference implementation in XLA: scores and softmax in float32. Without a cache the queries are cut into blocks, and each
block meets only the keys it may see, which skips half the work of causal attention and most of a windowed one's.
"""

import math

import jax.numpy as jnp
from jax import Array

QUERY_BLOCK = 128


def _attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q [B, T, H, h]; k, v [B, K, S, h]; mask broadcastable to [B, 1, 1, T, S]. Returns [B, T, H, h]."""
    batch, q_len, n_head, head_dim = q.shape
    n_kv_head = k.shape[1]
    grouped = q.reshape(batch, q_len, n_kv_head, n_head // n_kv_head, head_dim)
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * (1.0 / math.sqrt(head_dim)), -jnp.inf)
    scores = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = scores / scores.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, q_len, n_head, head_dim).astype(q.dtype)


def _visible(q_positions: Array, k_positions: Array, window: int | None) -> Array:
    """True where a key is at or before the query and at most `window` positions behind it (window + 1 keys)."""
    distance = q_positions[..., :, None] - k_positions[..., None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance <= window)


def causal_attention(q: Array, k: Array, v: Array, *, window: int | None) -> Array:
    """Self-attention of whole sequences. q [B, T, H, h]; k, v [B, T, K, h] with H a multiple of K. Returns [B, T, H, h]."""
    length = q.shape[1]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window)
        mask = _visible(jnp.arange(start, stop), jnp.arange(first, stop), window)
        blocks.append(_attend(q[:, start:stop], k[:, :, first:stop], v[:, :, first:stop], mask))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def cached_attention(q: Array, k: Array, v: Array, positions: Array, *, window: int | None) -> Array:
    """Attention of new tokens over a cache that already holds their keys.

    q [B, T, H, h] at positions [B, T]; k, v [B, K, S, h] where slot s holds position s. Slots after a query's position
    (right padding, or an earlier occupant's) are masked. Returns [B, T, H, h].
    """
    mask = _visible(positions, jnp.arange(k.shape[2])[None], window)[:, None, None]
    return _attend(q, k, v, mask)

"""Parameter counts by group, and training FLOPs per token."""

import functools

import jax

from nanochat_jax.model.config import SMEAR_GATE_CHANNELS, GPTConfig
from nanochat_jax.model.weights import MATRICES, abstract_params, optimizer_groups


@functools.lru_cache(maxsize=64)
def param_counts(config: GPTConfig) -> dict[str, int]:
    """Number of parameters of each optimizer group."""
    counts: dict[str, int] = {}
    leaves, groups = (
        jax.tree.leaves(abstract_params(config)),
        jax.tree.leaves(optimizer_groups(config)),
    )
    for leaf, group in zip(leaves, groups, strict=True):
        counts[group] = counts.get(group, 0) + leaf.size
    return counts


def num_params(config: GPTConfig) -> int:
    return sum(param_counts(config).values())


def num_matrix_params(config: GPTConfig) -> int:
    """Parameters of all matrices inside the blocks, value-embedding gates included."""
    return param_counts(config)[MATRICES]


def num_scaling_params(config: GPTConfig) -> int:
    """Parameters that the modern scaling laws count: the blocks' matrices and the unembedding."""
    return num_matrix_params(config) + param_counts(config)["lm_head"]


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs per token: 6 per matmul weight, 12 per head channel and visible key."""
    weights = num_scaling_params(config) + SMEAR_GATE_CHANNELS * config.smear
    keys = sum(
        config.sequence_len if window is None else min(window, config.sequence_len)
        for window in config.windows
    )
    return 6 * weights + 12 * config.n_head * config.head_dim * keys

"""Reinforcement learning from checked answers: REINFORCE with the group's mean as baseline.

Of each prompt several replies are sampled from the current parameters, a task judges them, and the log-probability of
each sampled token is raised or lowered by its reply's advantage, reward minus the mean reward of the prompt's replies.
Left out of GRPO (Shao et al. 2024, arXiv:2402.03300) are division by the standard deviation, the KL penalty, ratios and
clipping; the samples are always on-policy. A prompt whose replies are all right or all wrong teaches nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from nanochat_jax.chat import render_for_completion
from nanochat_jax.config import GPTConfig
from nanochat_jax.eval.batching import bucket
from nanochat_jax.gpt import Params, forward
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.request import Request
from nanochat_jax.loss import chunk_length, cross_entropy
from nanochat_jax.sharding import replicated
from nanochat_jax.step import TrainState
from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rollout:
    """One reply: tokens of prompt and reply, and for each whether the model drew it (not the prompt, not a tool)."""

    tokens: list[int]
    sampled: list[bool]
    reward: float


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    num_samples: int = 16
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 50


def sample_rollouts(engine: Engine, tokenizer: Tokenizer, task: Task, conversations: Sequence[Conversation],
                    config: RolloutConfig, *, seed: int) -> list[list[Rollout]]:
    """`num_samples` judged replies to each conversation, all in flight together; `seed` names the random streams."""
    prompts = [tuple(render_for_completion(tokenizer, conversation)) for conversation in conversations]
    streams = np.random.SeedSequence(seed).generate_state(len(prompts) * config.num_samples)
    requests = [
        Request(prompt, max_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
                seed=int(streams[i * config.num_samples + sample]))
        for i, prompt in enumerate(prompts) for sample in range(config.num_samples)
    ]
    results = engine.generate(requests)
    groups = []
    for i, (prompt, conversation) in enumerate(zip(prompts, conversations, strict=True)):
        group = []
        for result in results[i * config.num_samples : (i + 1) * config.num_samples]:
            reward = float(task.evaluate(conversation, tokenizer.decode(result.tokens)))
            group.append(Rollout([*prompt, *result.tokens], [False] * len(prompt) + list(result.sampled), reward))
        groups.append(group)
    return groups


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Reward minus the mean of its prompt's rewards, [E, S] to [E, S]. Not divided by their deviation, which blows up
    where all but one agree."""
    return rewards - rewards.mean(axis=1, keepdims=True)


class PolicyBatch(NamedTuple):
    """Rows to learn from: the loss is the sum of `weights` times the negative log-likelihoods of `targets`."""

    inputs: np.ndarray  # [N, T] int32
    targets: np.ndarray  # [N, T] int32, -1 where nothing is learned
    weights: np.ndarray  # [N, T] float32


def policy_batch(groups: Sequence[Sequence[Rollout]], *, pass_rows: int, multiple: int = 1) -> PolicyBatch:
    """The rows of E groups of S rollouts, padded to a power-of-two length and to a multiple of `multiple` rows.

    Upstream's loss, the mean over passes of -sum(log p * advantage) / max(1, trained tokens of the pass), where a pass
    is `pass_rows` rollouts of one prompt. As a weight per token it does not depend on the micro-batches.
    Raises ValueError if `pass_rows` does not divide S.
    """
    num_samples = len(groups[0])
    if num_samples % pass_rows:
        raise ValueError(f"{num_samples} samples of a prompt are not a multiple of the {pass_rows} rows of a pass")
    rollouts = [rollout for group in groups for rollout in group]
    advantage = advantages(np.array([[rollout.reward for rollout in group] for group in groups])).ravel()
    rows = -(-len(rollouts) // multiple) * multiple
    length = bucket(max(len(rollout.tokens) for rollout in rollouts) - 1)
    inputs, targets = np.zeros((rows, length), np.int32), np.full((rows, length), -1, np.int32)
    for row, rollout in enumerate(rollouts):
        tokens, end = np.array(rollout.tokens, np.int32), len(rollout.tokens) - 1
        inputs[row, :end] = tokens[:-1]
        targets[row, :end] = np.where(rollout.sampled[1:], tokens[1:], -1)
    counts = (targets[: len(rollouts)] >= 0).sum(axis=1).reshape(-1, pass_rows).sum(axis=1)
    scale = np.repeat(1.0 / (np.maximum(counts, 1) * len(counts)), pass_rows)
    weights = np.zeros((rows, length), np.float32)
    weights[: len(rollouts)] = (advantage * scale)[:, None]
    return PolicyBatch(inputs, targets, weights)


def policy_loss(params: Params, inputs: Array, targets: Array, weights: Array, *, config: GPTConfig,
                dtype: Any = jnp.float32, remat: str = "none", num_devices: int = 1) -> tuple[Array, Array]:
    """Scalar loss of rows [B, T], whose gradient is the policy gradient, and log-probabilities [B, T] of the targets."""
    hidden, _ = forward(params, inputs, config=config, compute_dtype=dtype, remat=remat)
    unembedding = params["lm_head"][:, : config.vocab_size]
    chunk = chunk_length(*inputs.shape, config.vocab_size, num_devices)
    loss, nll = cross_entropy(hidden, unembedding, targets, weights, config.softcap, chunk)
    return loss, -nll


def make_policy_step(config: GPTConfig, optimizer: optax.GradientTransformation, *, dtype: Any, mesh: Mesh,
                     shardings: TrainState, remat: str = "none") -> Callable:
    """Jitted `step(state, inputs, targets, weights) -> (state, {"loss", "grad_norm", "entropy"})` of micro-batches [A, B, T].

    The entropy, in nats a token, is estimated by the mean negative log-probability of what was sampled.
    """

    def micro_loss(params: Params, *rows: Array) -> tuple[Array, Array]:
        loss, log_probs = policy_loss(params, *rows, config=config, dtype=dtype, remat=remat, num_devices=mesh.size)
        return loss, log_probs.sum()

    def step(state: TrainState, *rows: Array) -> tuple[TrainState, dict[str, Array]]:
        def accumulate(carry, micro_batch):
            (loss, log_prob), grads = jax.value_and_grad(micro_loss, has_aux=True)(state.params, *micro_batch)
            return jax.tree.map(jnp.add, carry, (loss, log_prob, grads)), None

        zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        (loss, log_prob, grads), _ = jax.lax.scan(accumulate, zeros, rows)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads),
                   "entropy": -log_prob / jnp.maximum((rows[1] >= 0).sum(), 1)}
        return TrainState(optax.apply_updates(state.params, updates), opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def statistics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """What a log says of E groups of S rollouts. `reward_std` is the spread among all of them, `reward_group_std` the mean
    spread within a prompt's; `mixed` is the share of prompts with replies of both kinds, from which alone is learned."""
    rewards = np.array([[rollout.reward for rollout in group] for group in groups])
    advantage = advantages(rewards)
    lengths = [len(rollout.tokens) for group in groups for rollout in group]
    sampled = [sum(rollout.sampled) for group in groups for rollout in group]
    return {
        "reward": float(rewards.mean()), "reward_std": float(rewards.std()),
        "reward_group_std": float(rewards.std(axis=1).mean()), "mixed": float((np.ptp(rewards, axis=1) > 0).mean()),
        "advantage_min": float(advantage.min()), "advantage_max": float(advantage.max()),
        "sequence_length": float(np.mean(lengths)), "sequence_length_max": max(lengths),
        "sampled_tokens": float(np.mean(sampled)),
    }


def pass_at_k(rewards: np.ndarray) -> np.ndarray:
    """For k = 1..S the share of problems of which one of the first k samples is right; rewards [P, S] to [S]."""
    return (np.maximum.accumulate(rewards, axis=1) > 0).mean(axis=0)

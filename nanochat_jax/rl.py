"""Reinforcement learning from checked answers: REINFORCE with the group's mean as baseline.

Of each prompt several replies are sampled from the current parameters, a task judges them, and the log-probability of
each sampled token is raised or lowered by its reply's advantage, reward minus the mean reward of the prompt's replies.
Left out of GRPO (Shao et al. 2024, arXiv:2402.03300) are division by the standard deviation, the KL penalty, ratios and
clipping; the samples are always on-policy. A prompt whose replies are all right or all wrong teaches nothing.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from nanochat_jax.eval.chat import MAX_PROMPT_TOKENS, Sampling
from nanochat_jax.gpt import Params, forward
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.request import Request
from nanochat_jax.kernels import forward_options
from nanochat_jax.loss import chunk_length, cross_entropy
from nanochat_jax.sharding import replicated
from nanochat_jax.step import TrainState
from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FLAT_STEPS = 3  # without a difference of rewards to learn from, until the first warning


@dataclass(frozen=True)
class Rollout:
    """One reply: tokens of prompt and reply, and for each whether the model drew it (not the prompt, not a tool);
    `log_prob` is the sum of the model's log-probabilities of those, before temperature and top-k."""

    tokens: list[int]
    sampled: list[bool]
    reward: float
    log_prob: float = 0.0


def sample_rollouts(engine: Engine, tokenizer: Tokenizer, task: Task, conversations: Sequence[Conversation],
                    sampling: Sampling) -> list[list[Rollout]]:
    """`num_samples` judged replies to each conversation, all in flight together; the seed names the random streams."""

    def cut(tokens: list[int]) -> tuple[int, ...]:
        """As the engine cuts it, for the same tokens are trained on."""
        return engine.generation(Request(tuple(tokens), max_tokens=sampling.max_new_tokens, truncate=True)).prompt

    rendered = [render_for_completion(tokenizer, each, MAX_PROMPT_TOKENS) for each in conversations]
    fitting = list(map(cut, rendered))
    if count := sum(len(short) < len(tokens) for short, tokens in zip(fitting, rendered, strict=True)):
        log.warning("%d of %d prompts are too long for the context of %d tokens: the beginning of each is cut off", count,
                    len(fitting), engine.max_len)
    prompts = [prompt for prompt in fitting for _ in range(sampling.num_samples)]
    streams = np.random.SeedSequence(sampling.seed).generate_state(len(prompts))
    results = engine.generate([
        Request(prompt, max_tokens=sampling.max_new_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
                seed=int(stream), logprobs=True)
        for prompt, stream in zip(prompts, streams)
    ])
    rollouts = []
    for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        reward = float(task.evaluate(conversations[i // sampling.num_samples], result.text))
        log_prob = sum(each for each, sampled in zip(result.logprobs or (), result.sampled, strict=True) if sampled)
        rollouts.append(Rollout([*prompt, *result.tokens], [False] * len(prompt) + list(result.sampled), reward, log_prob))
    return [rollouts[i : i + sampling.num_samples] for i in range(0, len(rollouts), sampling.num_samples)]


def rewards_of(groups: Sequence[Sequence[Rollout]]) -> np.ndarray:
    """[E, S]"""
    return np.array([[rollout.reward for rollout in group] for group in groups])


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Reward minus the mean of its prompt's rewards, [E, S] to [E, S]. Not divided by their deviation, which blows up
    where all but one agree."""
    return rewards - rewards.mean(axis=1, keepdims=True)


class PolicyBatch(NamedTuple):
    """Rows to learn from: the loss is the sum of `weights` times the negative log-likelihoods of `targets`."""

    inputs: np.ndarray  # [N, T] int32
    targets: np.ndarray  # [N, T] int32, -1 where nothing is learned
    weights: np.ndarray  # [N, T] float32


def policy_batches(groups: Sequence[Sequence[Rollout]], *, pass_rows: int, micro_rows: int, unit: int = 32
                   ) -> Iterator[PolicyBatch]:
    """The rows of E groups of S rollouts that something is learned from, `micro_rows` at a time, short ones first; their
    length is a multiple of `unit`.

    Upstream's loss, the mean over passes of -sum(log p * advantage) / max(1, trained tokens of the pass), where a pass
    is `pass_rows` rollouts of one prompt. As a weight per token it does not depend on the micro-batches, and replies of
    advantage 0 need not be there. Raises ValueError if `pass_rows` does not divide S.
    """
    num_samples = len(groups[0])
    if num_samples % pass_rows:
        raise ValueError(f"{num_samples} samples of a prompt are not a multiple of the {pass_rows} rows of a pass")
    rollouts = [rollout for group in groups for rollout in group]
    advantage = advantages(rewards_of(groups)).ravel()
    counts = np.array([sum(rollout.sampled) for rollout in rollouts]).reshape(-1, pass_rows).sum(axis=1)
    weight = advantage * np.repeat(1.0 / (np.maximum(counts, 1) * len(counts)), pass_rows)
    order = sorted(np.flatnonzero(weight), key=lambda i: len(rollouts[i].tokens))
    for start in range(0, len(order), micro_rows):
        chosen = order[start : start + micro_rows]
        length = bucket(len(rollouts[chosen[-1]].tokens) - 1, unit)
        inputs, targets = np.zeros((micro_rows, length), np.int32), np.full((micro_rows, length), -1, np.int32)
        weights = np.zeros((micro_rows, length), np.float32)
        for row, index in enumerate(chosen):
            tokens, end = np.array(rollouts[index].tokens, np.int32), len(rollouts[index].tokens) - 1
            inputs[row, :end] = tokens[:-1]
            targets[row, :end] = np.where(rollouts[index].sampled[1:], tokens[1:], -1)
            weights[row] = weight[index]
        yield PolicyBatch(inputs, targets, weights)


def policy_loss(params: Params, inputs: Array, targets: Array, weights: Array, *, config: GPTConfig,
                dtype: Any = jnp.float32, remat: str = "none", attention: str = "auto", mesh: Mesh | None = None
                ) -> tuple[Array, Array]:
    """Scalar loss of rows [B, T], whose gradient is the policy gradient, and log-probabilities [B, T] of the targets."""
    how = forward_options(config, mesh, dtype=dtype, length=inputs.shape[1], attention=attention)
    hidden, _ = forward(params, inputs, config=config, compute_dtype=dtype, remat=remat, **how)
    unembedding = params["lm_head"][:, : config.vocab_size]
    chunk = chunk_length(inputs.shape[0], inputs.shape[1], config.vocab_size, mesh.size if mesh else 1)
    loss, nll = cross_entropy(hidden, unembedding, targets, weights, config.softcap, chunk)
    return loss, -nll


def make_policy_step(config: GPTConfig, optimizer: optax.GradientTransformation, *, dtype: Any, mesh: Mesh,
                     shardings: TrainState, remat: str = "none", attention: str = "auto"
                     ) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """`step(state, micro_batches) -> (state, {"loss", "grad_norm"})`, of any number of `PolicyBatch`es of global arrays.

    It compiles once for each of their lengths. The state given is used up.
    """

    def loss_of(params: Params, *rows: Array) -> Array:
        return policy_loss(params, *rows, config=config, dtype=dtype, remat=remat, attention=attention, mesh=mesh)[0]

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=(replicated(mesh), shardings.params))
    def accumulate(params: Params, sums: tuple[Array, Params], *rows: Array) -> tuple[Array, Params]:
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_of)(params, *rows))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    def update(state: TrainState, grads: Params) -> tuple[TrainState, Array]:
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), optax.tree.norm(grads)

    @functools.partial(jax.jit, out_shardings=(replicated(mesh), shardings.params))
    def zeros(params: Params) -> tuple[Array, Params]:
        return jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)

    def step(state: TrainState, micro_batches: Iterable[PolicyBatch]) -> tuple[TrainState, dict[str, Array]]:
        loss, grads = zeros(state.params)
        for rows in micro_batches:
            loss, grads = accumulate(state.params, (loss, grads), *rows)
        state, grad_norm = update(state, grads)
        return state, {"loss": loss, "grad_norm": grad_norm}

    return step


def statistics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """What a log says of E groups of S rollouts. `reward_std` is the spread among all of them, `reward_group_std` the mean
    spread within a prompt's; `mixed` is the share of prompts with replies of both kinds, from which alone is learned.
    The entropy, in nats a token, is estimated by the mean negative log-probability of what was sampled."""
    rewards = rewards_of(groups)
    advantage = advantages(rewards)
    lengths = [len(rollout.tokens) for group in groups for rollout in group]
    sampled = [sum(rollout.sampled) for group in groups for rollout in group]
    log_prob = sum(rollout.log_prob for group in groups for rollout in group)
    return {
        "reward": float(rewards.mean()), "reward_std": float(rewards.std()),
        "reward_group_std": float(rewards.std(axis=1).mean()), "mixed": float((np.ptp(rewards, axis=1) > 0).mean()),
        "advantage_min": float(advantage.min()), "advantage_max": float(advantage.max()),
        "sequence_length": float(np.mean(lengths)), "sequence_length_max": max(lengths),
        "sampled_tokens": float(np.mean(sampled)), "entropy": -log_prob / max(1, sum(sampled)),
    }


class RewardWatch:
    """Warns when the replies to each prompt have equal rewards for several steps in a row: after 3, 6, 12, ... steps."""

    def __init__(self) -> None:
        self._flat, self._due = 0, FLAT_STEPS

    def step(self, figures: Mapping[str, float]) -> None:
        """Take the `statistics` of the next step."""
        if figures["mixed"]:
            self._flat, self._due = 0, FLAT_STEPS
            return
        self._flat += 1
        if self._flat == self._due:
            self._due *= 2
            log.warning("all replies to each prompt had the same reward in the last %d steps (mean %.2f), so nothing was "
                        "learned: check the references of the task, raise --num-samples, or choose easier or harder problems",
                        self._flat, figures["reward"])


def pass_at_k(rewards: np.ndarray) -> np.ndarray:
    """For k = 1..S the share of problems of which one of the first k samples is right; rewards [P, S] to [S]."""
    return (np.maximum.accumulate(rewards, axis=1) > 0).mean(axis=0)

"""Reinforcement learning from rewarded replies: REINFORCE with the group's mean as baseline.

Several replies to each prompt are sampled from the current parameters, and a task rewards them. A
reply's advantage is its reward minus the mean reward of the prompt's replies; it weights the
log-probability of each sampled token. This is GRPO (Shao et al. 2024, arXiv:2402.03300) without the
division by the standard deviation, the KL penalty, ratios and clipping; samples are always
on-policy. A prompt whose replies all have the same reward contributes nothing.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nanochat_jax.conversation import render_for_completion
from nanochat_jax.eval.chat import MAX_PROMPT_TOKENS, Sampling
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.padding import padded_length
from nanochat_jax.infer.request import Request
from nanochat_jax.model.loss import Batch
from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FLAT_STEPS = 3  # steps without different rewards before the first warning


@dataclass(frozen=True)
class Rollout:
    """One reply.

    Attributes:
      tokens: of the prompt and the reply.
      sampled: per token, whether the model sampled it (not the prompt's, not a tool's).
      log_prob: sum over sampled tokens, before temperature and top-k.
    """

    tokens: list[int]
    sampled: list[bool]
    reward: float
    log_prob: float = 0.0


def sample_rollouts(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    conversations: Sequence[Conversation],
    sampling: Sampling,
) -> list[list[Rollout]]:
    """`num_samples` rewarded replies to each conversation, generated together.

    The seed determines the random streams.
    """
    rendered = [
        render_for_completion(tokenizer, conversation, MAX_PROMPT_TOKENS)
        for conversation in conversations
    ]
    requests = _requests(_truncated(engine, rendered, sampling.max_new_tokens), sampling)
    rollouts = []
    for i, (request, result) in enumerate(zip(requests, engine.generate(requests), strict=True)):
        prompt, sampled = request.tokens, list(result.sampled)
        log_probs = zip(result.logprobs or (), sampled, strict=True)
        rollouts.append(
            Rollout(
                [*prompt, *result.tokens],
                [False] * len(prompt) + sampled,
                float(task.evaluate(conversations[i // sampling.num_samples], result.text)),
                sum(log_prob for log_prob, is_sampled in log_probs if is_sampled),
            )
        )
    return [
        rollouts[i : i + sampling.num_samples]
        for i in range(0, len(rollouts), sampling.num_samples)
    ]


def _truncated(
    engine: Engine, prompts: Sequence[list[int]], max_tokens: int
) -> list[tuple[int, ...]]:
    """The prompts as the engine truncates them, so that training uses the same tokens."""
    truncated = [
        engine.generation(Request(tuple(tokens), max_tokens=max_tokens, truncate=True)).prompt
        for tokens in prompts
    ]
    count = sum(len(short) < len(tokens) for short, tokens in zip(truncated, prompts, strict=True))
    if count:
        log.warning(
            "%d of %d prompts are longer than the context of %d tokens: their beginnings are cut "
            "off",
            count,
            len(prompts),
            engine.max_len,
        )
    return truncated


def _requests(prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> list[Request]:
    """`num_samples` requests per prompt, in order, each with its own random stream."""
    count = len(prompts) * sampling.num_samples
    streams = np.random.SeedSequence(sampling.seed).generate_state(count)
    return [
        Request(
            prompts[i // sampling.num_samples],
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            seed=int(stream),
            logprobs=True,
        )
        for i, stream in enumerate(streams)
    ]


def rewards_of(groups: Sequence[Sequence[Rollout]]) -> np.ndarray:
    """The rewards [E, S] of E groups of S rollouts."""
    return np.array([[rollout.reward for rollout in group] for group in groups])


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Reward minus the mean of its prompt's rewards, [E, S] to [E, S].

    Not divided by the standard deviation, which is tiny if all but one agree.
    """
    return rewards - rewards.mean(axis=1, keepdims=True)


def policy_batch(
    groups: Sequence[Sequence[Rollout]], *, pass_rows: int, micro_rows: int, unit: int = 32
) -> Batch:
    """A batch [A, B, T] of the rollouts with an advantage, from E groups of S. B is `micro_rows`.

    Upstream's loss: the mean over passes of -sum(log p * advantage) / max(1, trained tokens of the
    pass), where a pass is `pass_rows` rollouts of one prompt. Here it is a weight per token, so the
    result does not depend on the micro-batches. A is a power of two and T a multiple of `unit`, so
    few programs are compiled; padding has no targets. Raises ValueError if `pass_rows` does not
    divide S.
    """
    num_samples = len(groups[0])
    if num_samples % pass_rows:
        raise ValueError(
            f"{num_samples} samples of a prompt are not a multiple of the {pass_rows} rows of a "
            "pass"
        )
    rollouts = [rollout for group in groups for rollout in group]
    advantage = advantages(rewards_of(groups)).ravel()
    counts = (
        np.array([sum(rollout.sampled) for rollout in rollouts]).reshape(-1, pass_rows).sum(axis=1)
    )
    weight = advantage * np.repeat(1.0 / (np.maximum(counts, 1) * len(counts)), pass_rows)
    chosen = np.flatnonzero(weight)
    length = padded_length(max((len(rollouts[i].tokens) for i in chosen), default=2) - 1, unit)
    rows = micro_rows * 2 ** max(0, math.ceil(math.log2(max(1, len(chosen)) / micro_rows)))
    inputs, targets = np.zeros((rows, length), np.int32), np.full((rows, length), -1, np.int32)
    weights = np.zeros((rows, length), np.float32)
    for row, index in enumerate(chosen):
        tokens, end = np.array(rollouts[index].tokens, np.int32), len(rollouts[index].tokens) - 1
        inputs[row, :end] = tokens[:-1]
        targets[row, :end] = np.where(rollouts[index].sampled[1:], tokens[1:], -1)
        weights[row] = weight[index]
    return Batch(*(x.reshape(-1, micro_rows, length) for x in (inputs, targets, weights)))


def statistics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Metrics of E groups of S rollouts.

    `reward_std` is over all rollouts, `reward_group_std` the mean over prompts. `mixed` is the
    fraction of prompts with different rewards, the only ones to learn from. The entropy, in nats
    per token, is the mean negative log-probability of the sampled tokens.
    """
    rewards = rewards_of(groups)
    advantage = advantages(rewards)
    lengths = [len(rollout.tokens) for group in groups for rollout in group]
    sampled = [sum(rollout.sampled) for group in groups for rollout in group]
    log_prob = sum(rollout.log_prob for group in groups for rollout in group)
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "reward_group_std": float(rewards.std(axis=1).mean()),
        "mixed": float((np.ptp(rewards, axis=1) > 0).mean()),
        "advantage_min": float(advantage.min()),
        "advantage_max": float(advantage.max()),
        "sequence_length": float(np.mean(lengths)),
        "sequence_length_max": max(lengths),
        "sampled_tokens": float(np.mean(sampled)),
        "entropy": -log_prob / max(1, sum(sampled)),
    }


class RewardWatch:
    """Warns after 3, 6, 12, ... steps in a row without different rewards for any prompt."""

    def __init__(self) -> None:
        self._flat, self._due = 0, FLAT_STEPS

    def step(self, figures: Mapping[str, float]) -> None:
        """Check the `statistics` of the next step."""
        if figures["mixed"]:
            self._flat, self._due = 0, FLAT_STEPS
            return
        self._flat += 1
        if self._flat == self._due:
            self._due *= 2
            log.warning(
                "all replies to each prompt had the same reward in the last %d steps (mean %.2f), "
                "so nothing was learned: check the references of the task, raise `num_samples`, "
                "or choose easier or harder problems",
                self._flat,
                figures["reward"],
            )


def pass_at_k(rewards: np.ndarray) -> np.ndarray:
    """For k = 1..S, the fraction of problems with a correct one among the first k samples.

    rewards [P, S] to [S].
    """
    return (np.maximum.accumulate(rewards, axis=1) > 0).mean(axis=0)

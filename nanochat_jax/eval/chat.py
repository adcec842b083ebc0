"""Chat evaluation: accuracy of a model's replies on tasks.

Categorical tasks use one forward pass: the reply is the letter with the highest next-token logit.
Generative tasks use the engine, with all problems in flight and tools enabled; the task evaluates
the text.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nanochat_jax.conversation import render_for_completion
from nanochat_jax.errors import UsageError, explaining
from nanochat_jax.files import parse_json, write_file
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.padding import padded_batches
from nanochat_jax.infer.request import Request, Result
from nanochat_jax.model.compute import REFERENCE, Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.gpt import forward, unembed
from nanochat_jax.model.sharding import data_size, replicated, spread_rows
from nanochat_jax.model.weights import Params
from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_PROMPT_TOKENS = 1 << 16  # prompts are not truncated

# ChatCORE is the mean accuracy above chance over all of these tasks. Upstream uses six tasks in
# 2025 and five in 2026 (and in its README's table); the two numbers are not comparable.
CHATCORE_5 = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")
CHATCORE_6 = (*CHATCORE_5, "spelling_bee")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem and its result."""

    index: int
    question: str  # the last user message
    # the replies with tool calls and special tokens; the chosen letter of a categorical task
    completions: tuple[str, ...]
    passed: bool  # the visible text of one of the replies is correct


def accuracy(problems: Sequence[Problem]) -> float:
    return sum(problem.passed for problem in problems) / len(problems)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters: `num_samples` replies per problem, of at most `max_new_tokens` each."""

    num_samples: int = 1
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 50
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A model to evaluate, with up to `num_slots` replies in parallel.

    Prompts can have any length: a long one is decoded beyond the trained sequence length, not
    truncated.
    """

    config: GPTConfig
    params: Params
    tokenizer: Tokenizer
    num_slots: int = 8
    compute: Compute = REFERENCE

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Result]]:
        """The replies to each prompt."""
        requests = [
            Request(
                tuple(prompt),
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                seed=sampling.seed + i * sampling.num_samples + sample,
            )
            for i, prompt in enumerate(prompts)
            for sample in range(sampling.num_samples)
        ]
        longest = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
        engine = Engine(
            self.config,
            self.params,
            self.tokenizer,
            num_slots=min(self.num_slots, len(requests)),
            compute=self.compute,
            max_len=longest,
        )
        results = engine.generate(requests)
        return [
            results[i : i + sampling.num_samples]
            for i in range(0, len(results), sampling.num_samples)
        ]


def evaluate_categorical(task: Task, generator: Generator) -> list[Problem]:
    """The likeliest letter of every problem; the first one on ties."""
    conversations = list(task)
    tokenizer, mesh = generator.tokenizer, generator.compute.mesh
    prompts = prompts_of(tokenizer, conversations)
    most = max(len(conversation["letters"]) for conversation in conversations)
    problems: dict[int, Problem] = {}
    for indices, tokens in padded_batches(
        prompts,
        tokens=generator.num_slots * generator.config.sequence_len,
        devices=1 if mesh is None else data_size(mesh),
    ):
        lengths, letters = np.ones(len(tokens), np.int32), np.zeros((len(tokens), most), np.int32)
        for row, index in enumerate(indices):
            lengths[row] = len(prompts[index])
            ids = [_letter_id(tokenizer, letter) for letter in conversations[index]["letters"]]
            letters[row, : len(ids)] = ids
        rows = (tokens, lengths, letters)
        sharded = rows if mesh is None else [spread_rows(mesh, array) for array in rows]
        logits = np.asarray(
            _letter_logits(
                generator.params, *sharded, config=generator.config, compute=generator.compute
            )
        )
        if not np.isfinite(logits[: len(indices)]).all():
            raise FloatingPointError("the model's logits are not finite")
        for row, index in enumerate(indices):
            choices = conversations[index]["letters"]
            letter = choices[int(np.argmax(logits[row, : len(choices)]))]
            problems[index] = _judged(task, index, conversations[index], [letter], [letter])
    return [problems[index] for index in range(len(conversations))]


def prompts_of(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> list[list[int]]:
    return [
        render_for_completion(tokenizer, conversation, MAX_PROMPT_TOKENS)
        for conversation in conversations
    ]


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _letter_logits(
    params: Params,
    tokens: Array,
    lengths: Array,
    letters: Array,
    *,
    config: GPTConfig,
    compute: Compute,
) -> Array:
    """Logits [B, C] of letters [B, C] after the first lengths [B] of tokens [B, T]."""
    hidden, _ = forward(params, tokens, config, compute)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = jnp.take_along_axis(unembed(params, last, config=config), letters, axis=1)
    if compute.mesh is None:
        return logits
    return jax.lax.with_sharding_constraint(logits, replicated(compute.mesh))


def _letter_id(tokenizer: Tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise ValueError(f"the answer {letter!r} is {len(ids)} tokens, it must be one")
    return ids[0]


def evaluate_generative(task: Task, generator: Generator, sampling: Sampling) -> list[Problem]:
    """Generate replies to all problems, then evaluate them in threads: some run programs."""
    conversations = list(task)
    replies = generator(prompts_of(generator.tokenizer, conversations), sampling)
    texts = [[result.text for result in results] for results in replies]
    decode = generator.tokenizer.decode
    completions = [[decode(result.tokens) for result in results] for results in replies]
    judge = functools.partial(_judged, task)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(judge, itertools.count(), conversations, texts, completions))


def _judged(
    task: Task,
    index: int,
    conversation: Conversation,
    texts: Sequence[str],
    completions: Sequence[str],
) -> Problem:
    return Problem(
        index=index,
        question=conversation["messages"][-2]["content"],
        completions=tuple(completions),
        passed=any(task.evaluate(conversation, text) for text in texts),
    )


def evaluate_task(task: Task, generator: Generator, sampling: Sampling) -> list[Problem]:
    """Evaluate a task of either type.

    Raises `UsageError` if it has no problems, and ValueError if it is only for training.
    """
    began = time.monotonic()
    if not len(task):
        raise UsageError(f"task {task.key} has no problems to evaluate")
    if task.eval_type == "categorical":
        problems = evaluate_categorical(task, generator)
    elif task.eval_type == "generative":
        problems = evaluate_generative(task, generator, sampling)
    else:
        raise ValueError(f"{type(task).__name__} is only for training, it cannot be evaluated")
    logger.info(
        f"{task.key}: {sum(problem.passed for problem in problems)} of {len(problems)} right "
        f"({accuracy(problems):.2%}) in {time.monotonic() - began:.1f} s"
    )
    return problems


def chatcore(accuracies: Mapping[str, float], baselines: Mapping[str, float]) -> dict[str, float]:
    """`chatcore_6` and `chatcore_5`, each if `accuracies` (by task key) has all of its tasks."""
    scores = {}
    for name, keys in (("chatcore_6", CHATCORE_6), ("chatcore_5", CHATCORE_5)):
        if all(key in accuracies for key in keys):
            centered = [(accuracies[key] - baselines[key]) / (1.0 - baselines[key]) for key in keys]
            scores[name] = sum(centered) / len(centered)
    return scores


def own_key(key: str, file: Path, directory: Path, *, reserved: bool) -> str:
    """Key of a question file's results: `key`, plus a hash if `reserved` or another file's."""
    record, path = directory / "chat_eval_files.json", str(file.resolve())
    with explaining(f"{record} is damaged", "delete it"):
        known = dict(parse_json(record.read_bytes())) if record.exists() else {}
    if reserved or known.get(key, path) != path:
        key = f"{key}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    write_file(record, json.dumps(known | {key: path}, indent=1) + "\n")
    return key


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Write one JSON object per line, in task order; replaces the file atomically."""
    write_file(path, "".join(json.dumps(asdict(problem)) + "\n" for problem in problems))

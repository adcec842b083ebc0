"""The reinforcement learning stage: rollouts, policy steps and evaluations."""

import dataclasses
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from nanochat_jax.checkpoint import Loaded, find_model, lock_tag
from nanochat_jax.cli import LARGEST_SEED, count, flag, inherited
from nanochat_jax.devices import start
from nanochat_jax.errors import UsageError
from nanochat_jax.eval.chat import Sampling
from nanochat_jax.files import make_directory
from nanochat_jax.infer.engine import Engine
from nanochat_jax.model.attention import check_attention
from nanochat_jax.model.compute import Compute, device_of, resolve_dtype
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.kernels import LANES
from nanochat_jax.model.sharding import data_size, make_mesh, mesh_text, spread_rows
from nanochat_jax.model.size import num_params
from nanochat_jax.model.weights import Params
from nanochat_jax.paths import Paths
from nanochat_jax.tasks import load_eval_task, task_names
from nanochat_jax.tasks.base import Task, TaskMixture
from nanochat_jax.tasks.custom_json import CustomJSON
from nanochat_jax.train.config import ContinueConfig, RunConfig, factor
from nanochat_jax.train.finetune import continued_job, continued_optimizer, load_source
from nanochat_jax.train.job import Evaluation, StepBatch
from nanochat_jax.train.loop import train
from nanochat_jax.train.optim import Schedules, constant, trapezoid
from nanochat_jax.train.policy import (
    RewardWatch,
    Rollout,
    pass_at_k,
    policy_batch,
    rewards_of,
    sample_rollouts,
    statistics,
)
from nanochat_jax.train.reporting import log_training
from nanochat_jax.train.setup import Run, set_up

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChatRLConfig(ContinueConfig):
    source: str = flag("sft", "stage to start from", choices=["mid", "sft"])
    task: str = flag(
        "auto",
        "training task, such as GSM8K, or several joined by |, which are mixed; auto: GSM8K, or "
        "WordArithmetic for a model of the embedded corpus",
        check=task_names,
    )
    task_file: str | None = flag(
        None, "train on the problems of this JSON Lines file instead; a tenth of them is held out"
    )
    device_batch_size: int = count(
        8,
        "rows per device and micro-step; the loss is averaged over the tokens of this many rows",
        at_most=10**6,
    )
    examples_per_step: int = count(16, "prompts per optimizer step", at_most=10**6)
    num_samples: int = count(16, "replies sampled per prompt", at_most=10**6)
    num_slots: int = count(64, "replies generated in parallel", at_most=10**6)
    max_new_tokens: int = count(256, "longest reply in tokens", at_most=2**24)
    temperature: float = flag(1.0, "sampling temperature; 0 is greedy", at_least=0, at_most=100)
    top_k: int = count(50, "sample among the k likeliest tokens; 0: all", at_least=0, at_most=10**6)
    init_lr_frac: float = factor(0.05, "factor of all learning rates, which fall linearly to 0")
    num_epochs: int = count(1, "passes over the training problems", at_most=10**6)
    num_iterations: int = count(-1, "optimizer steps; -1: by the epochs", also=-1)
    eval_every: int = count(
        60, "steps between evaluations; -1: only at the start and the end", also=-1
    )
    eval_examples: int = count(400, "test problems of an evaluation")
    save_every: int = inherited(RunConfig, "save_every", 60)
    seed: int = count(42, "seed of the sampling", at_least=0, at_most=LARGEST_SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples % self.device_batch_size:
            raise ValueError(
                f"`num_samples={self.num_samples}` is not a multiple of "
                f"`device_batch_size={self.device_batch_size}`"
            )


def load_tasks(config: ChatRLConfig, data: str | None, paths: Paths) -> tuple[str, Task, Task]:
    """(name, problems to train on, held-out problems)."""
    name = config.task
    if name == "auto":
        name = "WordArithmetic" if data == "embedded" else "GSM8K"
    splits = []
    for split in ("train", "test"):
        if config.task_file:
            tasks: list[Task] = [CustomJSON(Path(config.task_file), split=split)]
            name = tasks[0].key
        else:
            tasks = [load_eval_task(part, paths, split) for part in name.split("|")]
        if any(task.eval_type != "generative" for task in tasks):
            raise UsageError(
                f"{name} has no generated replies to reward: choose a task such as GSM8K"
            )
        splits.append(TaskMixture(tasks) if len(tasks) > 1 else tasks[0])
    return name, splits[0], splits[1]


class Sampler:
    """Samples and rewards replies with the given parameters. One engine serves all of them."""

    def __init__(self, config: ChatRLConfig, model: Loaded, compute: Compute) -> None:
        self._config, self._tokenizer, self._params = config, model.tokenizer, model.params
        self._engine = Engine(
            model.config, model.params, model.tokenizer, num_slots=config.num_slots, compute=compute
        )

    def __call__(
        self, params: Params, task: Task, indices: Iterable[int], **sampling: Any
    ) -> list[list[Rollout]]:
        config = self._config
        if params is not self._params:
            self._engine, self._params = self._engine.with_params(params), params
        settings = {
            name: getattr(config, name)
            for name in ("num_samples", "max_new_tokens", "temperature", "top_k")
        }
        conversations = [task[i % len(task)] for i in indices]
        return sample_rollouts(
            self._engine, self._tokenizer, task, conversations, Sampling(**settings | sampling)
        )

    def evaluate(self, params: Params, task: Task) -> dict[str, float]:
        """Metrics of the first test problems.

        `accuracy` is of greedy replies, pass@k for k = 1..device_batch_size of sampled ones, with
        the same random streams each time.
        """
        indices = range(min(self._config.eval_examples, len(task)))
        greedy = self(params, task, indices, num_samples=1, temperature=0.0)
        drawn = self(
            params,
            task,
            indices,
            num_samples=self._config.device_batch_size,
            seed=self._config.seed,
        )
        shares = pass_at_k(rewards_of(drawn))
        return {"accuracy": float((rewards_of(greedy) > 0).mean())} | {
            f"pass@{k}": float(share) for k, share in enumerate(shares, start=1)
        }


class RolloutSource:
    """The batch of each step: rewarded replies to the next prompts, sampled on-policy."""

    on_policy: ClassVar[bool] = True
    position: dict[str, Any] = {}

    def __init__(
        self, config: ChatRLConfig, sampler: Sampler, task: Task, unit: int, mesh: Mesh
    ) -> None:
        self._config, self.sampler, self._task = config, sampler, task
        self._unit, self._mesh = unit, mesh
        self._watch = RewardWatch()

    def next_batch(self, step: int, params: Params) -> StepBatch:
        config, began = self._config, time.monotonic()
        examples = range(step * config.examples_per_step, (step + 1) * config.examples_per_step)
        groups = self.sampler(params, self._task, examples, seed=config.seed + 1 + step)
        figures = statistics(groups)
        self._watch.step(figures)
        figures["rollout_seconds"] = time.monotonic() - began
        batch = policy_batch(
            groups,
            pass_rows=config.device_batch_size,
            unit=self._unit,
            micro_rows=config.device_batch_size * data_size(self._mesh),
        )
        sharded = jax.tree.map(partial(spread_rows, self._mesh, axis=1), batch)
        return StepBatch(sharded, batch._asdict(), figures)

    def get_state(self) -> dict[str, Any]:
        """Empty: the step number determines the prompts and the random streams."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass


def sampling_memory(config: ChatRLConfig, model: GPTConfig, mesh: Mesh) -> int:
    """Bytes per device that the engine needs: a copy of the parameters, and full KV caches."""
    keys_and_values = 2 * model.n_layer * model.n_kv_head * model.head_dim * model.sequence_len
    numbers = num_params(model) + keys_and_values * config.num_slots // data_size(mesh)
    return numbers * resolve_dtype(config.dtype).itemsize // mesh.shape["model"]


def reinforce(config: ChatRLConfig) -> None:
    """Run the stage: from a finetuned model to checkpoints, metrics and a section of the report."""
    paths = Paths.from_env()
    start(paths, config, compile_cache=config.compile_cache)
    # A task named in the config needs no model: report typos in it before loading one.
    named = load_tasks(config, None, paths) if config.task_file or config.task != "auto" else None
    make_directory(paths.report)
    tag = find_model(paths, config.source, config.model_tag).name
    with lock_tag(paths.checkpoints("rl") / tag):
        _reinforce(config, paths, named)


def _reinforce(config: ChatRLConfig, paths: Paths, named: tuple[str, Task, Task] | None) -> None:
    mesh = make_mesh(config.mesh)
    loaded = load_source(config, paths, config.source, mesh)
    name, task, test = named or load_tasks(config, loaded.meta["data"], paths)
    num_steps = config.num_iterations
    if num_steps <= 0:
        num_steps = len(task) // config.examples_per_step * config.num_epochs
    if num_steps < 1:
        raise UsageError(
            f"`examples_per_step={config.examples_per_step}` is more than {name}'s {len(task)} "
            "problems"
        )
    multiplier = trapezoid(num_steps, warmup=0, warmdown_ratio=1.0, final_fraction=0.0)
    schedules = Schedules(lr_multiplier=multiplier, momentum=constant(0.95))
    run = set_up(
        config,
        loaded.config,
        mesh,
        lambda compute: continued_optimizer(config, loaded, schedules, compute),
        batch=None,
        params=loaded.params,
        reserved=sampling_memory(config, loaded.config, mesh),
    )
    loaded = dataclasses.replace(loaded, params=run.state.params)
    source = _source(config, loaded, task, run)
    log.info(
        f"chat_rl: {name}, {len(task)} problems, {num_steps} steps of {config.examples_per_step} x "
        f"{config.num_samples} replies, mesh {mesh_text(mesh)}, {run.compute.dtype}"
    )
    evaluation = Evaluation(
        config.eval_every, lambda params: source.sampler.evaluate(params, test), at_start=True
    )
    job = continued_job(
        config,
        paths,
        loaded,
        "rl",
        name="chat_rl",
        num_steps=num_steps,
        shape=None,
        lr_multiplier=multiplier,
        evaluations=[evaluation],
        metadata={"task": name},
        shown=("reward", "sequence_length"),
    )
    began = time.monotonic()
    outcome = train(job, run.state, run.shardings, run.step_fn, source)
    seconds = time.monotonic() - began
    results = {"task": name, "num_iterations": num_steps, **outcome.last, "seconds": seconds}
    log_training(job, paths, "Chat RL", results)


def _source(config: ChatRLConfig, loaded: Loaded, task: Task, run: Run) -> RolloutSource:
    # row lengths are a multiple of this; Splash needs full lanes
    unit = LANES if device_of(run.mesh).platform == "tpu" else 32
    # before anything is deleted or sampled
    check_attention(run.compute, length=unit, head_dim=loaded.config.head_dim)
    return RolloutSource(config, Sampler(config, loaded, run.compute), task, unit, run.mesh)

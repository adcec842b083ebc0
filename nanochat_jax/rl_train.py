"""The stage of reinforcement learning: rollouts, policy steps and evaluations in turn."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nanochat_jax import report
from nanochat_jax.checkpoint import Checkpoints, Loaded, claim_directory, keep_tokenizer, load_model
from nanochat_jax.cli import UsageError, flag
from nanochat_jax.eval.chat import Sampling
from nanochat_jax.gpt import REMAT, Params
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.request import Request
from nanochat_jax.metrics import Display, MetricsLog, start_wandb
from nanochat_jax.optim import OptimizerConfig, constant, make_optimizer, trapezoid
from nanochat_jax.paths import Paths
from nanochat_jax.rl import (
    Rollout,
    make_policy_step,
    pass_at_k,
    policy_batches,
    rewards_of,
    sample_rollouts,
    statistics,
)
from nanochat_jax.sharding import data_size, make_mesh, spread_rows
from nanochat_jax.startup import Processes, start
from nanochat_jax.step import TrainState, init_state, resolve_dtype
from nanochat_jax.stopping import EXIT_STOPPED, Interrupted, StopRequest
from nanochat_jax.tasks import load_eval_task
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.custom_json import CustomJSON
from nanochat_jax.train import is_due, restore_state

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChatRLConfig(Processes):
    task: str = flag("auto", "what to learn, such as GSM8K or SpellingBee; auto: GSM8K, or WordArithmetic "
                             "for a model of the embedded corpus")
    task_file: str | None = flag(None, "learn the problems of this JSON Lines file instead; a tenth of them is held out")
    run: str = flag("dummy", "wandb run name; dummy turns wandb off")
    mesh: str = flag("auto", "devices as DxM: D-way data and M-way tensor parallelism")
    fsdp: bool = flag(False, "shard the parameters over the data axis too")
    dtype: str = flag("auto", "compute dtype", choices=["auto", "float32", "bfloat16"])
    remat: str = flag("none", "activations that the backward pass recomputes, to save memory", choices=REMAT)
    model_tag: str | None = flag(None, "name of the checkpoint directory; default the largest d<depth>", short="-g")
    step: int | None = flag(None, "step of the checkpoint to start from; default the newest", short="-s")
    device_batch_size: int = flag(8, "rows per device and micro-step; the loss is a mean over the tokens of as many")
    examples_per_step: int = flag(16, "prompts of an optimizer step")
    num_samples: int = flag(16, "replies sampled of each prompt")
    num_slots: int = flag(64, "replies in flight at once")
    max_new_tokens: int = flag(256, "longest reply")
    temperature: float = flag(1.0, "of the sampling")
    top_k: int = flag(50, "sample among the k likeliest tokens; 0: all")
    embedding_lr: float | None = flag(None, "rate of the embedding tables; default the base run's")
    unembedding_lr: float | None = flag(None, "rate of the unembedding; default the base run's")
    matrix_lr: float | None = flag(None, "Muon's rate of the matrices; default the base run's")
    init_lr_frac: float = flag(0.05, "factor of all rates, which fall linearly to 0")
    num_epochs: int = flag(1, "passes over the training problems")
    num_iterations: int = flag(-1, "optimizer steps; -1: by the epochs")
    eval_every: int = flag(60, "steps between evaluations; -1: only at the start and the end")
    eval_examples: int = flag(400, "test problems of an evaluation")
    save_every: int = flag(60, "steps between checkpoints; -1: only at the end")
    keep: int = flag(2, "how many of the newest checkpoints to keep")
    resume: bool = flag(False, "continue from the newest checkpoint of this tag, if there is one")
    fresh: bool = flag(False, "delete the checkpoints that this tag already has, and start over")
    seed: int = flag(42, "of the sampling")

    def __post_init__(self) -> None:
        for name in ("device_batch_size", "examples_per_step", "num_samples", "eval_examples", "keep", "num_slots",
                     "num_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}")
        Request((0,), max_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k)  # checks the ranges
        if self.num_samples % self.device_batch_size:
            raise ValueError(f"--num-samples {self.num_samples} is not a multiple of --device-batch-size "
                             f"{self.device_batch_size}")
        if self.resume and self.fresh:
            raise ValueError("--resume goes on with the checkpoints of a tag, --fresh deletes them: give one of them")


def load_tasks(config: ChatRLConfig, data: str | None, paths: Paths) -> tuple[str, Task, Task]:
    """What is learned: its name, the problems to train on and those held out."""
    task: Task
    test: Task
    if config.task_file:
        path = Path(config.task_file)
        task, test = CustomJSON(path, split="train"), CustomJSON(path, split="test")
        name = task.key
    else:
        name = config.task if config.task != "auto" else "WordArithmetic" if data == "embedded" else "GSM8K"
        task, test = load_eval_task(name, paths, "train"), load_eval_task(name, paths, "test")
    if task.eval_type != "generative":
        raise UsageError(f"{name} has no replies to reward: choose a task whose answers are written, such as GSM8K")
    return name, task, test


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws and judges replies with the parameters it is given."""

    config: ChatRLConfig
    model: Loaded
    dtype: Any
    mesh: Mesh

    def __call__(self, params: Params, task: Task, indices: Sequence[int], **sampling: Any) -> list[list[Rollout]]:
        config = self.config
        engine = Engine(self.model.config, params, self.model.tokenizer, num_slots=config.num_slots,
                        compute_dtype=self.dtype, mesh=self.mesh)
        settings = {name: getattr(config, name) for name in ("num_samples", "max_new_tokens", "temperature", "top_k")}
        conversations = [task[i % len(task)] for i in indices]
        return sample_rollouts(engine, self.model.tokenizer, task, conversations, Sampling(**settings | sampling))

    def evaluate(self, params: Params, task: Task) -> dict[str, float]:
        """On the first test problems: `accuracy` of the most likely reply, and pass@k for k = 1..device_batch_size of
        sampled ones, of the same random streams each time."""
        indices = range(min(self.config.eval_examples, len(task)))
        greedy = self(params, task, indices, num_samples=1, temperature=0.0)
        drawn = self(params, task, indices, num_samples=self.config.device_batch_size, seed=self.config.seed)
        shares = pass_at_k(rewards_of(drawn))
        return {"accuracy": float((rewards_of(greedy) > 0).mean())} | {
            f"pass@{k}": float(share) for k, share in enumerate(shares, start=1)}


def reinforce(config: ChatRLConfig) -> None:
    """The whole stage: from a finetuned model to checkpoints, metrics and a section of the report."""
    paths = Paths.from_env()
    start(paths, processes=config)
    mesh, dtype = make_mesh(config.mesh), resolve_dtype(config.dtype)
    loaded = load_model(paths, "sft", tag=config.model_tag, step=config.step, mesh=mesh, fsdp=config.fsdp)
    model, meta = loaded.config, loaded.meta
    name, task, test = load_tasks(config, meta["data"], paths)
    num_steps = config.num_iterations if config.num_iterations > 0 else (
        len(task) // config.examples_per_step * config.num_epochs)
    if num_steps < 1:
        raise UsageError(f"--examples-per-step {config.examples_per_step} is more than {name}'s {len(task)} problems")

    given = {key: value for key in ("embedding_lr", "unembedding_lr", "matrix_lr")
             if (value := getattr(config, key)) is not None}
    rates = OptimizerConfig(**(meta["rates"] | given | {"weight_decay": 0.0, "grad_clip": 0.0}))
    multiplier = trapezoid(num_steps, warmup=0, warmdown_ratio=1.0, final_fraction=0.0)
    optimizer = make_optimizer(model, rates, lr_multiplier=multiplier, momentum=constant(0.95),
                               lr_scale=config.init_lr_frac, muon_dtype=dtype, mesh=mesh)
    state, shardings = init_state(model, optimizer, mesh, fsdp=config.fsdp, seed=config.seed, params=loaded.params)
    step_fn = make_policy_step(model, optimizer, dtype=dtype, mesh=mesh, shardings=shardings, remat=config.remat)
    sampler = Sampler(config=config, model=loaded, dtype=dtype, mesh=mesh)
    micro_rows = config.device_batch_size * data_size(mesh)
    log.info("chat_rl: %s, %d problems, %d steps of %d x %d replies, mesh %s, %s", name, len(task), num_steps,
             config.examples_per_step, config.num_samples, "x".join(map(str, mesh.shape.values())), dtype)

    directory, logs = paths.checkpoints("rl") / loaded.tag, paths.logs("rl") / loaded.tag
    metadata = {"model_config": dataclasses.asdict(model), "config": dataclasses.asdict(config), "task": name,
                "from": ["sft", loaded.tag, loaded.step]}
    metadata |= {key: meta[key] for key in ("tokenizer", "data", "rates")}
    wandb_run = start_wandb(config.run, "nanochat-rl", dataclasses.asdict(config))
    figures: dict[str, float] = {}
    began = time.monotonic()
    claim_directory(directory, resume=config.resume, fresh=config.fresh)
    keep_tokenizer(loaded.tokenizer, directory, loaded)
    with Checkpoints(directory, keep=config.keep) as checkpoints, StopRequest() as stop:
        restored = None
        if config.resume:
            restored = restore_state(checkpoints, state, shardings, model=model, metadata=metadata, num_steps=num_steps)
        first = 0
        if restored is not None:
            state, first = TrainState(restored.params, restored.optimizer), restored.step
            log.info("resuming %s at step %d", directory, first)
        metrics_log = MetricsLog(logs / "metrics.jsonl", resume_step=first if restored else None, steps=directory,
                                 wandb_run=wandb_run)
        display = Display("chat_rl", num_steps, start=first)

        def save(step: int) -> None:
            if restored is None or step > first:
                metrics_log.copy()
                checkpoints.save(step, state.params, state.optimizer, json.loads(json.dumps(metadata | {"step": step})))

        try:
            for step in range(first, num_steps + 1):
                last = step == num_steps
                checkpoints.check()
                if stop.reached(step) and not last:
                    raise Interrupted
                if last or is_due(step, config.save_every):
                    save(step)
                # What a signal breaks off here is sampled again after a resume.
                with stop.interruptible():
                    if last or step == 0 or is_due(step, config.eval_every):
                        figures = sampler.evaluate(state.params, test)
                        metrics_log.write(step=step, kind="eval", time=time.time(), **figures)
                        display.note(f"chat_rl step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
                    if last:
                        break
                    started = time.monotonic()
                    examples = range(step * config.examples_per_step, (step + 1) * config.examples_per_step)
                    groups = sampler(state.params, task, examples, seed=config.seed + 1 + step)
                    sampled = time.monotonic()
                batches = policy_batches(groups, pass_rows=config.device_batch_size, micro_rows=micro_rows)
                state, metrics = step_fn(state, (jax.tree.map(partial(spread_rows, mesh), batch) for batch in batches))
                figures_of_step = statistics(groups) | {key: float(value) for key, value in metrics.items()}
                if not all(math.isfinite(figures_of_step[key]) for key in ("loss", "grad_norm")):
                    raise UsageError(f"step {step}: loss {figures_of_step['loss']}, gradient norm "
                                     f"{figures_of_step['grad_norm']}. "
                                     "Not saved: go on from the checkpoint before with --resume and a lower --init-lr-frac")
                metrics_log.write(step=step, kind="train", time=time.time(), **figures_of_step, lrm=float(multiplier(step)),
                                  rollout_seconds=sampled - started, train_seconds=time.monotonic() - sampled)
                display.update(step + 1, reward=f"{figures_of_step['reward']:.3f}",
                               length=f"{figures_of_step['sequence_length']:.0f}")
            checkpoints.wait()
        except Interrupted:
            if checkpoints.last_step() != step:
                save(step)
            checkpoints.wait()
            log.warning("stopped by signal %d at step %d and saved: run the same command with --resume to go on",
                        stop.signal, step)
            raise SystemExit(EXIT_STOPPED) from None
        finally:
            display.close()
            metrics_log.close()
            if wandb_run is not None:
                wandb_run.finish()
    if jax.process_index() == 0:
        results: dict[str, float | str] = {"task": name, "num_iterations": num_steps, **figures,
                                           "seconds": time.monotonic() - began}
        report.log_section(paths.report, "Chat RL", [dataclasses.asdict(config), results], stage="chat_rl",
                           results=results, curves=logs / "metrics.jsonl")

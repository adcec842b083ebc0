"""Reinforcement learning of the finetuned model on problems whose answers can be checked.

    python -m scripts.chat_rl
    python -m scripts.chat_rl --task spelling --num-iterations 30
"""

import dataclasses
import json
import logging
import time
from dataclasses import dataclass

import jax
import numpy as np

from nanochat_jax import cli, report
from nanochat_jax.checkpoint import Checkpoints, load_model
from nanochat_jax.cli import UsageError, flag
from nanochat_jax.infer.engine import Engine
from nanochat_jax.metrics import Display, MetricsLog, start_wandb
from nanochat_jax.optim import OptimizerConfig, constant, make_optimizer, trapezoid
from nanochat_jax.paths import Paths
from nanochat_jax.rl import RolloutConfig, make_policy_step, pass_at_k, policy_batch, sample_rollouts
from nanochat_jax.sharding import data_size, global_batch, make_mesh
from nanochat_jax.startup import start
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.skills import Arithmetic, LetterCount, Spelling, load_words
from nanochat_jax.train import TrainState, init_state, resolve_dtype

log = logging.getLogger(__name__)

SKILL_SIZES = {"train": 640, "test": 200}  # generated problems


@dataclass(frozen=True, kw_only=True)
class ChatRLConfig:
    task: str = flag("auto", "what to learn; auto: gsm8k, arithmetic for a model of the embedded corpus",
                     choices=["auto", "gsm8k", "arithmetic", "spelling", "letter_count"])  # fmt: skip
    run: str = flag("dummy", "wandb run name; dummy turns wandb off")
    mesh: str = flag("auto", "devices as DxM: D-way data and M-way tensor parallelism")
    fsdp: bool = flag(False, "shard the parameters over the data axis too")
    dtype: str = flag("auto", "compute dtype", choices=["auto", "float32", "bfloat16"])
    remat: bool = flag(False, "recompute each block's activations in the backward pass, to save memory")
    model_tag: str | None = flag(None, "name of the checkpoint directory; default the largest d<depth>", short="-g")
    step: int | None = flag(None, "step of the checkpoint to start from; default the newest", short="-s")
    device_batch_size: int = flag(8, "rows per device and micro-step; also the rows over which the loss is a mean of tokens")
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
    eval_every: int = flag(60, "steps between evaluations; -1: only at the end")
    eval_examples: int = flag(400, "test problems of an evaluation")
    save_every: int = flag(60, "steps between checkpoints; -1: only at the end")
    keep: int = flag(2, "how many of the newest checkpoints to keep")
    resume: bool = flag(False, "continue from the newest checkpoint of this tag, if there is one")
    seed: int = flag(42, "of the sampling")

    def __post_init__(self) -> None:
        if self.num_samples % self.device_batch_size:
            raise ValueError(f"--num-samples {self.num_samples} is not a multiple of --device-batch-size "
                             f"{self.device_batch_size}")  # fmt: skip


def load_task(name: str, split: str, paths: Paths) -> Task:
    if name == "gsm8k":
        return GSM8K(paths, split)
    if name == "arithmetic":
        return Arithmetic(split, SKILL_SIZES[split])
    return {"spelling": Spelling, "letter_count": LetterCount}[name](split, SKILL_SIZES[split], load_words(paths.data("embedded")))


def main(config: ChatRLConfig) -> None:
    paths = Paths.from_env()
    start(paths)
    mesh, dtype = make_mesh(config.mesh), resolve_dtype(config.dtype)
    loaded = load_model(paths, "sft", tag=config.model_tag, step=config.step, mesh=mesh, fsdp=config.fsdp)
    model, tokenizer = loaded.config, loaded.tokenizer
    name = config.task if config.task != "auto" else "arithmetic" if loaded.meta["data"] == "embedded" else "gsm8k"
    task, test = load_task(name, "train", paths), load_task(name, "test", paths)
    steps_per_epoch = len(task) // config.examples_per_step
    num_steps = config.num_iterations if config.num_iterations > 0 else steps_per_epoch * config.num_epochs
    if num_steps < 1:
        raise UsageError(f"--examples-per-step {config.examples_per_step} is more than the {len(task)} problems of {name}")

    given = {key: value for key in ("embedding_lr", "unembedding_lr", "matrix_lr")
             if (value := getattr(config, key)) is not None}  # fmt: skip
    rates = OptimizerConfig(**(loaded.meta["rates"] | given | {"weight_decay": 0.0, "grad_clip": 0.0}))
    multiplier = trapezoid(num_steps, warmup=0, warmdown_ratio=1.0, final_fraction=0.0)
    optimizer = make_optimizer(model, rates, lr_multiplier=multiplier, momentum=constant(0.95),
                               lr_scale=config.init_lr_frac, muon_dtype=dtype, mesh=mesh)  # fmt: skip
    state, shardings = init_state(model, optimizer, mesh, fsdp=config.fsdp, seed=config.seed, params=loaded.params)
    step_fn = make_policy_step(model, optimizer, dtype=dtype, mesh=mesh, shardings=shardings, remat=config.remat)
    rollouts = RolloutConfig(num_samples=config.num_samples, max_new_tokens=config.max_new_tokens,
                             temperature=config.temperature, top_k=config.top_k)  # fmt: skip
    micro_rows = config.device_batch_size * data_size(mesh)
    log.info("chat_rl: %s, %d problems, %d steps of %d x %d replies, %s", name, len(task), num_steps,
             config.examples_per_step, config.num_samples, dtype)  # fmt: skip

    def sample(source: Task, indices: range, settings: RolloutConfig, seed: int) -> list:
        engine = Engine(model, state.params, tokenizer, num_slots=config.num_slots, compute_dtype=dtype, mesh=mesh)
        conversations = [source[index % len(source)] for index in indices]
        return sample_rollouts(engine, tokenizer, source, conversations, settings, seed=seed)

    def evaluate(step: int) -> dict[str, float]:
        settings = dataclasses.replace(rollouts, num_samples=config.device_batch_size)
        groups = sample(test, range(min(config.eval_examples, len(test))), settings, seed=config.seed)
        shares = pass_at_k(np.array([[rollout.reward for rollout in group] for group in groups]))
        return {f"pass@{k}": float(share) for k, share in enumerate(shares, start=1)}

    directory = paths.checkpoints("rl") / loaded.tag
    metadata = {"model_config": dataclasses.asdict(model), "config": dataclasses.asdict(config), "task": name,
                "from": ["sft", loaded.tag, loaded.step],
                **{key: loaded.meta[key] for key in ("tokenizer", "data", "arch", "rates")}}  # fmt: skip
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    wandb_run = start_wandb(config.run, "nanochat-rl", dataclasses.asdict(config))
    with Checkpoints(directory, keep=config.keep) as checkpoints:
        restored = checkpoints.restore_latest(*abstract) if config.resume else None
        first = 0 if restored is None else restored.step
        if restored is not None:
            state = TrainState(restored.params, restored.optimizer)
        metrics_log = MetricsLog(directory / "metrics.jsonl", resume_step=first if restored else None, wandb_run=wandb_run)
        display, figures = Display("chat_rl", num_steps, start=first), {}
        for step in range(first, num_steps + 1):
            last = step == num_steps
            due = lambda every: last or (every > 0 and step > first and step % every == 0)  # noqa: E731
            if due(config.save_every) and (step > first or restored is None):
                checkpoints.save(step, state.params, state.optimizer, json.loads(json.dumps(metadata | {"step": step})))
            if due(config.eval_every) or step == 0:
                figures = evaluate(step)
                metrics_log.write(step=step, kind="eval", time=time.time(), **figures)
                display.note(f"chat_rl step {step}: " + ", ".join(f"{key} {value:.4f}" for key, value in figures.items()))
            if last:
                break
            indices = range(step * config.examples_per_step, (step + 1) * config.examples_per_step)
            groups = sample(task, indices, rollouts, seed=config.seed + 1 + step)
            batch = policy_batch(groups, pass_rows=config.device_batch_size, multiple=micro_rows)
            rows = (array.reshape(-1, micro_rows, array.shape[1]) for array in batch)
            share = slice(*(micro_rows * (jax.process_index() + i) // jax.process_count() for i in (0, 1)))
            state, metrics = step_fn(state, *(global_batch(mesh, array[:, share], batch_axis=1) for array in rows))
            rewards = np.array([[rollout.reward for rollout in group] for group in groups])
            advantage = rewards - rewards.mean(axis=1, keepdims=True)
            length = float(np.mean([len(rollout.tokens) for group in groups for rollout in group]))
            metrics_log.write(step=step, kind="train", reward=float(rewards.mean()), sequence_length=length,
                              advantage_min=float(advantage.min()), advantage_max=float(advantage.max()),
                              loss=float(metrics["loss"]), grad_norm=float(metrics["grad_norm"]),
                              lrm=float(multiplier(step)), time=time.time())  # fmt: skip
            display.update(step + 1, reward=f"{rewards.mean():.3f}", length=f"{length:.0f}")
        checkpoints.wait()
    display.close()
    metrics_log.close()
    if wandb_run is not None:
        wandb_run.finish()
    if jax.process_index() == 0:
        report.log_section(paths.report, "Chat RL", [dataclasses.asdict(config), figures], stage="chat_rl", results=figures,
                           curves=directory / "metrics.jsonl")


if __name__ == "__main__":
    cli.run(main, ChatRLConfig, prog="scripts.chat_rl", description=__doc__.splitlines()[0])

"""The train step and the one loop that pretraining, midtraining and finetuning share.

    state, metrics = step(state, batch)      pure, jitted once, donated; gradients accumulate inside

The loss is the sum over supervised tokens divided by their number in the whole batch, across micro-batches and devices,
so how a batch is cut never changes the result. Metrics of a step are read after the next one is dispatched.
"""

import collections
import dataclasses
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from nanochat_jax.checkpoint import Checkpoints, claim_directory
from nanochat_jax.cli import UsageError, flag
from nanochat_jax.config import GPTConfig
from nanochat_jax.gpt import Params, forward, init_params
from nanochat_jax.loss import chunk_length, cross_entropy
from nanochat_jax.metrics import Display, MetricsLog, peak_flops, peak_memory_bytes, start_wandb
from nanochat_jax.sharding import data_size, global_batch, optimizer_shardings, param_shardings, replicated

log = logging.getLogger(__name__)

EXIT_STOPPED = 75  # a signal stopped the run after a save: run the same command again to go on


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Flags that every training stage has. Stages extend it with their own."""

    run: str = flag("dummy", "wandb run name; dummy turns wandb off")
    mesh: str = flag("auto", "devices as DxM: D-way data and M-way tensor parallelism")
    fsdp: bool = flag(False, "shard the parameters over the data axis too")
    dtype: str = flag("auto", "compute dtype", choices=["auto", "float32", "bfloat16"])
    remat: bool = flag(False, "recompute each block's activations in the backward pass, to save memory")
    device_batch_size: int = flag(32, "rows per device and micro-step")
    total_batch_size: int = flag(-1, "tokens per optimizer step; -1: the recipe's")
    num_iterations: int = flag(-1, "optimizer steps; -1: the recipe's horizon")
    eval_every: int = flag(250, "steps between evaluations; -1: only at the end")
    eval_tokens: int = flag(20 * 524288, "tokens of an evaluation")
    save_every: int = flag(-1, "steps between checkpoints; -1: only at the end")
    keep: int = flag(2, "how many of the newest checkpoints to keep")
    resume: bool = flag(False, "continue from the newest checkpoint of this tag, if there is one")
    fresh: bool = flag(False, "delete the checkpoints that this tag already has, and start over")
    model_tag: str | None = flag(None, "name of the checkpoint directory; default d<depth>")
    seed: int = flag(42, "seed of the initial weights")

    def __post_init__(self) -> None:
        for name in ("device_batch_size", "eval_tokens", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.resume and self.fresh:
            raise ValueError("--resume goes on with the checkpoints of a tag, --fresh deletes them: give one of them")


class TrainState(NamedTuple):
    params: Params
    optimizer: Any


class Batches(Protocol):
    """An endless source of this process's rows of each step: inputs and targets, int32 [rows, T]."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


def resolve_dtype(name: str) -> Any:
    """The compute dtype: bfloat16 on accelerators and float32 on a CPU, unless named."""
    if name == "auto":
        name = "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


@dataclass(frozen=True)
class BatchShape:
    """How the rows of a step are cut: `accumulation` micro-batches of `micro_rows` rows over all devices."""

    rows: int
    accumulation: int
    sequence_len: int

    @property
    def micro_rows(self) -> int:
        return self.rows // self.accumulation

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence_len


def batch_shape(total_batch_size: int, device_batch_size: int, sequence_len: int, mesh: Mesh) -> BatchShape:
    """Cut `total_batch_size` tokens into micro-batches; raises `UsageError` with numbers that would fit."""
    if total_batch_size % sequence_len:
        raise UsageError(f"--total-batch-size {total_batch_size} is not a multiple of the sequence length {sequence_len}: "
                         f"try {max(total_batch_size // sequence_len, 1) * sequence_len}")
    rows, devices = total_batch_size // sequence_len, data_size(mesh)
    if rows % devices:
        raise UsageError(f"--total-batch-size {total_batch_size} has {rows} rows of {sequence_len} tokens, which do not "
                         f"divide over {devices} data-parallel devices: try {-(-rows // devices) * devices * sequence_len}")
    micro_rows = min(device_batch_size * devices, rows)
    if rows % micro_rows:
        fitting = max(size for size in range(1, device_batch_size + 1) if rows % (size * devices) == 0)
        raise UsageError(f"--device-batch-size {device_batch_size} on {devices} data-parallel devices does not divide the "
                         f"{rows} rows of a step: try --device-batch-size {fitting}")
    return BatchShape(rows, rows // micro_rows, sequence_len)


def make_train_step(config: GPTConfig, optimizer: optax.GradientTransformation, *, dtype: Any, mesh: Mesh,
                    shardings: TrainState, remat: bool = False) -> Callable:
    """Jitted `step(state, inputs [A, B, T], targets [A, B, T]) -> (state, {"loss", "grad_norm", "tokens"})`."""

    def micro_loss(params: Params, inputs: Array, targets: Array) -> tuple[Array, Array]:
        hidden, _ = forward(params, inputs, config=config, compute_dtype=dtype, remat=remat)
        weight = params["lm_head"][:, : config.vocab_size]
        chunk = chunk_length(*inputs.shape, config.vocab_size, mesh.size)
        total, _ = cross_entropy(hidden, weight, targets, jnp.ones(targets.shape), config.softcap, chunk)
        return total, (targets >= 0).sum()

    value_and_grad = jax.value_and_grad(micro_loss, has_aux=True)

    def step(state: TrainState, inputs: Array, targets: Array) -> tuple[TrainState, dict[str, Array]]:
        def accumulate(carry, micro_batch):
            (total, count), grads = value_and_grad(state.params, *micro_batch)
            return jax.tree.map(jnp.add, carry, (total, count, grads)), None

        if inputs.shape[0] == 1:
            (total, count), grads = value_and_grad(state.params, inputs[0], targets[0])
        else:
            zeros = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, state.params))
            (total, count, grads), _ = jax.lax.scan(accumulate, zeros, (inputs, targets))
        scale = 1.0 / jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        metrics = {"loss": total * scale, "grad_norm": optax.tree.norm(grads), "tokens": count}
        return TrainState(optax.apply_updates(state.params, updates), opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def init_state(config: GPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *, fsdp: bool, seed: int,
               params: Params | None = None) -> tuple[TrainState, TrainState]:
    """A placed train state, with fresh parameters unless given, and the tree of its shardings."""
    param_sharding = param_shardings(config, mesh, fsdp=fsdp)
    if params is None:
        params = jax.jit(lambda key: init_params(config, key), out_shardings=param_sharding)(jax.random.key(seed))
    opt_sharding = optimizer_shardings(jax.eval_shape(optimizer.init, params), params, param_sharding, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_sharding)(params)
    return TrainState(params, opt_state), TrainState(param_sharding, opt_sharding)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage's training: what the loop needs to know beside the state and the data."""

    name: str  # "base_train", "mid_train", "chat_sft"
    config: TrainConfig
    model: GPTConfig
    directory: Path  # of the tag's checkpoints
    num_steps: int
    shape: BatchShape
    lr_multiplier: Callable[[Any], Any]
    evaluate: Callable[[Params, int, bool], dict[str, float]]  # (params, step, last) -> figures for metrics.jsonl
    metadata: dict[str, Any]  # goes into every checkpoint: tokenizer fingerprint, corpus, ...
    primary: str = "val_bpb"  # the figure whose minimum is kept


@dataclass(frozen=True)
class Outcome:
    """What a finished run says of itself."""

    params: Params
    last: dict[str, float]  # figures of the last evaluation
    minimum: float  # of the primary figure
    train_loss: float  # smoothed
    seconds: float  # in training steps, without compilation, evaluation and saving
    tokens_per_sec: float
    mfu: float | None  # fraction of the devices' peak, None where that is unknown
    peak_memory: int | None


class _StopSignal:
    """Turns the first SIGTERM or SIGINT into a flag for the loop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "_StopSignal":
        self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number


class _StepClock:
    """Wall time between finished steps, without what lies between two stretches of training (saving, evaluating).

    A step is dispatched before the one before it is read, so single laps at the ends of a stretch are long or short;
    `mean` is over the last ten.
    """

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._laps: collections.deque[float] = collections.deque(maxlen=10)

    def restart(self) -> None:
        self._mark = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        self._laps.append(now - self._mark)
        self._mark = now
        return self._laps[-1]

    @property
    def mean(self) -> float:
        return sum(self._laps) / len(self._laps)


def train(job: Job, state: TrainState, shardings: TrainState, step_fn: Callable, batches: Batches) -> Outcome:
    """Run the loop to `num_steps`, resuming if the config asks for it. Exits the process with 75 after a signal's save.

    At step s, in this order: save, evaluate, stop if it is the last, train. So no evaluation can lose a checkpoint.
    """
    config = job.config
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    loop = {"minimum": math.inf, "smooth_loss": 0.0, "seconds": 0.0, "timed_steps": 0}
    start, last_figures = 0, {}
    claim_directory(job.directory, resume=config.resume, fresh=config.fresh)
    with Checkpoints(job.directory, keep=config.keep) as checkpoints, _StopSignal() as stop:
        restored = checkpoints.restore_latest(*abstract) if config.resume else None
        if restored is not None:
            if restored.state["model_config"] != dataclasses.asdict(job.model):
                raise UsageError(f"{job.directory} holds a model of another shape: use --fresh or another --model-tag")
            start, loop = restored.step, restored.state["loop"]
            if start > job.num_steps:
                raise UsageError(f"{job.directory} is at step {start}, past the {job.num_steps} of this run: use --fresh "
                                 "or another --model-tag")
            state = TrainState(restored.params, restored.optimizer)
            batches.set_state(restored.state["position"])
            log.info("resuming %s at step %d", job.directory, start)
        wandb_run = start_wandb(config.run, f"nanochat-{job.name}", dataclasses.asdict(config))
        metrics_log = MetricsLog(job.directory / "metrics.jsonl", resume_step=start if restored else None,
                                 wandb_run=wandb_run)
        display = Display(job.name, job.num_steps, start=start)
        peak = peak_flops(jax.devices()[0])
        devices = data_size(step_mesh := shardings.params["wte"].mesh) * step_mesh.shape["model"]
        flops_per_step = job.model.flops_per_token * job.shape.tokens

        def save(step: int) -> None:
            own = {"step": step, "model_config": dataclasses.asdict(job.model), "loop": loop,
                   "config": dataclasses.asdict(config), "position": batches.get_state()}
            assert not own.keys() & job.metadata.keys()
            checkpoints.save(step, state.params, state.optimizer, json.loads(json.dumps(own | job.metadata)))

        pending: tuple[int, Any] | None = None  # the step dispatched last, and its metrics
        clock = _StepClock()

        def finish(step: int, metrics: dict[str, Array]) -> None:
            """Read a dispatched step's metrics, which waits for it, and report them."""
            loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
            interval = clock.lap()
            if not math.isfinite(loss):
                raise UsageError(f"the loss of step {step} is {loss}: the last good checkpoint is step "
                                 f"{(checkpoints.steps() or ['none'])[-1]} in {job.directory}; lower the learning rates")
            loop["smooth_loss"] = 0.9 * loop["smooth_loss"] + 0.1 * loss
            smooth = loop["smooth_loss"] / (1.0 - 0.9 ** (step + 1))
            if step > start:  # the first step of a process compiles
                loop["seconds"] += interval
                loop["timed_steps"] += 1
            seconds = clock.mean
            rate = job.shape.tokens / seconds
            mfu = flops_per_step / seconds / (peak * devices) if peak else None
            metrics_log.write(step=step, kind="train", loss=loss, grad_norm=grad_norm, lrm=float(job.lr_multiplier(step)),
                              tokens_per_sec=rate, mfu=mfu, seconds=seconds, tokens=(step + 1) * job.shape.tokens,
                              time=time.time(), peak_memory=peak_memory_bytes())
            display.update(step + 1, loss=f"{smooth:.4f}", **{"tok/s": f"{rate:,.0f}"},
                           mfu=f"{100 * mfu:.1f}%" if mfu else "n/a")

        try:
            for step in range(start, job.num_steps + 1):
                last = step == job.num_steps
                if pending and (last or stop.received or _due(step, config.save_every) or _due(step, config.eval_every)):
                    finish(*pending)
                    pending = None
                resumed_here = restored is not None and step == start
                if not resumed_here and (last or stop.received or _due(step, config.save_every)):
                    save(step)
                if stop.received and not last:
                    checkpoints.wait()
                    display.close()
                    log.warning("stopped by signal %d at step %d and saved: run the same command with --resume to go on",
                                stop.received, step)
                    raise SystemExit(EXIT_STOPPED)
                if last or _due(step, config.eval_every):
                    last_figures = job.evaluate(state.params, step, last)
                    if job.primary in last_figures:
                        loop["minimum"] = min(loop["minimum"], last_figures[job.primary])
                    metrics_log.write(step=step, kind="eval", time=time.time(), **last_figures)
                    display.note(f"{job.name} step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in last_figures.items()))
                if last:
                    break
                if pending is None:
                    clock.restart()
                batch = next(batches)
                inputs, targets = (_place(batch[name], job.shape, step_mesh) for name in ("inputs", "targets"))
                state, metrics = step_fn(state, inputs, targets)
                if pending:
                    finish(*pending)
                pending = (step, metrics)
            checkpoints.wait()
        finally:
            display.close()
            metrics_log.close()
            if wandb_run is not None:
                wandb_run.finish()
    steps = max(loop["timed_steps"], 1)
    rate = job.shape.tokens * steps / loop["seconds"] if loop["seconds"] else 0.0
    return Outcome(
        params=state.params, last=last_figures, minimum=loop["minimum"],
        train_loss=loop["smooth_loss"] / (1.0 - 0.9**job.num_steps), seconds=loop["seconds"], tokens_per_sec=rate,
        mfu=job.model.flops_per_token * rate / (peak * devices) if peak else None, peak_memory=peak_memory_bytes(),
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _place(rows: np.ndarray, shape: BatchShape, mesh: Mesh) -> Array:
    """This process's rows [R, T] as a global array [A, B, T], rows spread over the data axis."""
    return global_batch(mesh, rows.reshape(shape.accumulation, -1, shape.sequence_len), batch_axis=1)

"""Optimizers and schedules of both architectures: AdamW for tables and scalars, else Muon."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from nanochat_jax.model.compute import REFERENCE, Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.recipe import CLASSIC, MODERN
from nanochat_jax.model.weights import MATRICES, SCALARS, optimizer_groups
from nanochat_jax.train.muon import muon

Schedule = Callable[[Array | int], Array]  # of the step
EPS = 1e-10


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Learning rates before width scaling, AdamW's weight decay and gradient clipping."""

    embedding_lr: float = MODERN.embedding_lr
    unembedding_lr: float = MODERN.unembedding_lr
    matrix_lr: float = MODERN.matrix_lr
    scalar_lr: float = MODERN.scalar_lr
    # of the AdamW groups of `classic`. `modern` does not use it: its AdamW groups have fixed
    # decays, and Muon's is `Schedules.weight_decay`.
    weight_decay: float = 0.0
    grad_clip: float = 0.0  # largest norm of the gradient; 0: no limit


CLASSIC_RATES = {
    name: getattr(CLASSIC, name)
    for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "grad_clip")
}


def trapezoid(
    num_steps: int, *, warmup: int, warmdown_ratio: float, final_fraction: float
) -> Schedule:
    """1 between a linear warm-up ((step + 1) / warmup) and a linear descent to `final_fraction`.

    The descent takes the last `warmdown_ratio` of the steps.
    """
    warmdown = round(warmdown_ratio * num_steps)

    def multiplier(step: Array | int) -> Array:
        step = jnp.asarray(step, jnp.float32)
        left = (num_steps - step) / max(warmdown, 1)
        down = jnp.where(step <= num_steps - warmdown, 1.0, left + (1.0 - left) * final_fraction)
        return jnp.where(step < warmup, (step + 1.0) / max(warmup, 1), down)

    return multiplier


def linear_momentum(steps: int, start: float, end: float) -> Schedule:
    return lambda step: (
        start + (end - start) * jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1.0)
    )


def modern_momentum(num_steps: int, warmdown_ratio: float) -> Schedule:
    """0.85 -> 0.97 over the first 400 steps; 0.97 -> 0.90 while the learning rate falls."""
    warmdown = round(warmdown_ratio * num_steps)

    def momentum(step: Array | int) -> Array:
        step = jnp.asarray(step, jnp.float32)
        left = jnp.clip((num_steps - step) / max(warmdown, 1), 0.0, 1.0)
        late = jnp.where(step < num_steps - warmdown, 0.97, 0.97 * left + 0.90 * (1.0 - left))
        return jnp.where(step < 400, 0.85 + 0.12 * step / 400, late)

    return momentum


def cosine_decay(weight_decay: float, num_steps: int) -> Schedule:
    return lambda step: (
        weight_decay * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.asarray(step, jnp.float32) / num_steps))
    )


def constant(value: float) -> Schedule:
    return lambda step: jnp.full((), value, jnp.float32)


def adamw(
    learning_rate: Schedule, b1: float, b2: float, weight_decay: float
) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=EPS, weight_decay=weight_decay)


def in_float32(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transform` computed in float32, with a state in the parameters' dtype."""

    def up(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = transform.update(up(grads), up(state), up(params))
        return updates, jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)

    return optax.GradientTransformation(transform.init, update)


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """Hyperparameters as functions of the step."""

    lr_multiplier: Schedule  # factor of all learning rates
    momentum: Schedule  # Muon's
    weight_decay: Schedule | None = None  # the matrices' cautious decay (modern only)
    # constant factor of the rates, from the batch size (modern: sqrt(B / 2^19))
    lr_scale: float = 1.0


def make_optimizer(
    config: GPTConfig, rates: OptimizerConfig, schedules: Schedules, compute: Compute = REFERENCE
) -> optax.GradientTransformation:
    """The optimizer of the config's architecture.

    `rates` are the learning rates before scaling by (width / 768)^-0.5, which affects only the
    AdamW tables, as upstream. Muon's matmuls use the dtype of `compute`; its matrices are sharded
    over all devices of the mesh.
    """
    lr_multiplier, lr_scale = schedules.lr_multiplier, schedules.lr_scale
    width_scale = (config.n_embd / 768) ** -0.5

    def rate(value: float) -> Schedule:
        return lambda step: value * lr_multiplier(step)

    embedding = rates.embedding_lr * lr_scale * width_scale
    unembedding = rates.unembedding_lr * lr_scale * width_scale
    scalar = rates.scalar_lr * lr_scale
    if config.arch == "modern":
        groups = {
            "lm_head": adamw(rate(unembedding), 0.8, 0.96, 0.01),
            "wte": in_float32(adamw(rate(embedding), 0.8, 0.995, 0.001)),
            "value_embeds": in_float32(adamw(rate(0.5 * embedding), 0.8, 0.995, 0.01)),
            "resid_lambdas": adamw(rate(0.01 * scalar), 0.8, 0.95, 0.05),
            "x0_lambdas": adamw(rate(scalar), 0.96, 0.95, 0.0),
            SCALARS: adamw(rate(0.2), 0.8, 0.95, 0.0),
        }
    else:
        groups = {
            "lm_head": adamw(rate(unembedding), 0.8, 0.95, rates.weight_decay),
            "wte": in_float32(adamw(rate(embedding), 0.8, 0.95, rates.weight_decay)),
        }
    groups[MATRICES] = muon(
        rate(rates.matrix_lr * lr_scale),
        schedules.momentum,
        schedules.weight_decay,
        variant=config.arch,
        compute_dtype=compute.dtype,
        mesh=compute.mesh,
    )
    transform = optax.partition(groups, optimizer_groups(config))
    if rates.grad_clip > 0:
        transform = optax.chain(optax.clip_by_global_norm(rates.grad_clip), transform)
    return transform

"""Setup of every training stage: devices, memory, optimizer, state and step."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nanochat_jax.model.compute import Compute, device_of
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.sharding import data_size, param_shardings
from nanochat_jax.model.weights import Params
from nanochat_jax.train.config import RunConfig
from nanochat_jax.train.memory import accelerator_memory, choose_batch_shape, choose_memory
from nanochat_jax.train.step import BatchShape, TrainState, init_state, make_train_step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A stage that is ready to train."""

    compute: Compute  # of evaluations: those never run in low precision
    state: TrainState
    shardings: TrainState
    step_fn: jax.stages.Wrapped  # the jitted step of step.py
    shape: BatchShape | None  # of its batches; None if it differs per step

    @property
    def mesh(self) -> Mesh:
        assert self.compute.mesh is not None
        return self.compute.mesh


def set_up(
    config: RunConfig,
    model: GPTConfig,
    mesh: Mesh,
    optimizer_for: Callable[[Compute], optax.GradientTransformation],
    *,
    batch: tuple[int, int] | None,
    params: Params | None = None,
    reserved: int = 0,
) -> Run:
    """Choose what fits into memory; build the state and the step.

    Args:
      batch: (tokens per step, tokens per row); None if batches differ in shape.
      params: initial parameters; by default drawn with the config's seed.
      reserved: bytes per device needed by something else.
    """
    limit = accelerator_memory()
    step_rows = batch[0] // batch[1] // data_size(mesh) if batch else 2**30
    rows, remat, fsdp = choose_memory(
        model,
        mesh,
        rows=config.device_batch_size,
        remat=config.remat,
        fsdp=config.fsdp,
        step_rows=step_rows,
        limit=limit and limit - reserved,
    )
    compute = Compute.on(
        mesh,
        dtype=config.dtype,
        remat=remat,
        attention=config.attention,
        precision=config.step_precision,
    )
    if compute.precision != "bf16":
        emulated = " (emulated)" if device_of(mesh).platform == "cpu" else ""
        log.info(f"matmuls of the layers in {compute.precision}{emulated}")
    if params is not None:
        params = jax.device_put(params, param_shardings(model, mesh, fsdp=fsdp))
    optimizer = optimizer_for(compute)
    tables = table_dtype(config, model, compute)
    state, shardings = init_state(
        model, optimizer, mesh, fsdp=fsdp, seed=config.seed, params=params, tables=tables
    )
    step_fn = make_train_step(model, optimizer, compute, shardings)
    shape = choose_batch_shape(*batch, rows, mesh, step_fn, state) if batch else None
    return Run(compute.replace(precision="bf16"), state, shardings, step_fn, shape)


def table_dtype(config: RunConfig, model: GPTConfig, compute: Compute) -> Any:
    """The dtype of the embedding tables and their moments; "auto" as upstream on accelerators."""
    if config.table_dtype != "auto":
        return jnp.dtype(config.table_dtype)
    accelerator = device_of(compute.mesh).platform != "cpu"
    return compute.dtype if accelerator and model.arch == "modern" else jnp.dtype("float32")

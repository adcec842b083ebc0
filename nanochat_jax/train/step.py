"""The training step: a pure function of state and batch; and the shape of its batches.

    state, metrics = step(state, batch)      jitted, donates the state; gradients accumulate inside

All stages train with it. Without weights the loss is the mean over all supervised tokens of the
batch, across micro-batches and devices, so the split into micro-batches never changes the result.
With weights (RL's advantages) it is the weighted sum.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanochat_jax.errors import UsageError
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.loss import Batch, token_nll
from nanochat_jax.model.sharding import (
    data_size,
    gather_over_data,
    global_batch,
    gradient_shardings,
    optimizer_shardings,
    param_shardings,
    replicated,
    sum_over_data,
)
from nanochat_jax.model.weights import Params, abstract_params, cast_tables, init_params


class TrainState(NamedTuple):
    params: Params
    optimizer: Any


@dataclass(frozen=True)
class BatchShape:
    """How a step's rows are split: `accumulation` micro-batches of `micro_rows` rows."""

    rows: int
    accumulation: int
    sequence_len: int

    @property
    def micro_rows(self) -> int:
        return self.rows // self.accumulation

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence_len


def batch_shape(
    total_batch_size: int, device_batch_size: int, sequence_len: int, mesh: Mesh
) -> BatchShape:
    """Split `total_batch_size` tokens into micro-batches.

    Raises `UsageError`, with numbers that would fit, if they do not divide.
    """
    if total_batch_size % sequence_len or total_batch_size < 1:
        raise UsageError(
            f"`total_batch_size={total_batch_size}` is not a multiple of the sequence length "
            f"{sequence_len}: try {max(total_batch_size // sequence_len, 1) * sequence_len}"
        )
    rows, devices = total_batch_size // sequence_len, data_size(mesh)
    if rows % devices:
        raise UsageError(
            f"`total_batch_size={total_batch_size}` has {rows} rows of {sequence_len} tokens, "
            f"which do not divide over {devices} data-parallel devices: try "
            f"{-(-rows // devices) * devices * sequence_len}"
        )
    micro_rows = min(device_batch_size * devices, rows)
    if rows % micro_rows:
        fitting = max(
            size for size in range(1, device_batch_size + 1) if rows % (size * devices) == 0
        )
        raise UsageError(
            f"`device_batch_size={device_batch_size}` on {devices} data-parallel devices does not "
            f"divide the {rows} rows of a step: try `device_batch_size={fitting}`"
        )
    return BatchShape(rows, rows // micro_rows, sequence_len)


def abstract_batch(shape: BatchShape, mesh: Mesh) -> Batch:
    """A step's batch as shapes and shardings."""
    rows = jax.ShapeDtypeStruct(
        (shape.accumulation, shape.micro_rows, shape.sequence_len),
        jnp.int32,
        sharding=NamedSharding(mesh, PartitionSpec(None, "data")),
    )
    return Batch(rows, rows)


def shard_batch(rows: Batch, shape: BatchShape, mesh: Mesh) -> Batch:
    """This process's rows [R, T] as global arrays [A, B, T], rows sharded over the data axis."""

    def cut(x: np.ndarray) -> Array:
        return global_batch(
            mesh, x.reshape(shape.accumulation, -1, shape.sequence_len), batch_axis=1
        )

    return jax.tree.map(cut, rows)


def make_train_step(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    compute: Compute,
    shardings: TrainState,
) -> jax.stages.Wrapped:
    """Jitted `step(state, batch of [A, B, T]) -> (state, {"loss", "grad_norm", "tokens"})`."""
    mesh = compute.mesh
    assert mesh is not None
    fsdp = data_size(mesh) > 1 and any(
        "data" in leaf.spec for leaf in jax.tree.leaves(shardings.params)
    )
    if fsdp:
        compute = compute.replace(gather=gather_over_data(shardings.params))
    share = gradient_shardings(config, shardings.params, mesh)

    def micro_loss(params: Params, batch: Batch) -> tuple[Array, Array]:
        total, _ = token_nll(params, batch, config, compute)
        return total, (batch.targets >= 0).sum()

    value_and_grad = jax.value_and_grad(micro_loss, has_aux=True)

    def summed(params: Params, batch: Batch) -> tuple[Array, Array, Params]:
        """Loss, supervised tokens and gradients, each summed over the batch [A, B, T]."""

        def accumulate(carry: tuple, micro_batch: Batch) -> tuple[tuple, None]:
            (total, count), grads = value_and_grad(params, micro_batch)
            # keeps libtpu 0.0.42 from moving reduce-scatters out of the loop, where it fails
            if fsdp:
                grads = jax.lax.optimization_barrier(grads)
            return jax.tree.map(jnp.add, carry, (total, count, grads)), None

        if batch.inputs.shape[0] == 1:
            (total, count), grads = value_and_grad(params, jax.tree.map(lambda x: x[0], batch))
            return total, count, grads
        zeros = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(accumulate, zeros, batch)[0]

    if data_size(mesh) > 1:
        # Each data shard sums its own gradients; once per step they are exchanged, and each device
        # receives the part that it updates.
        summed = sum_over_data(summed, mesh, shardings.params, share)

    def shared(tree: Params) -> Params:
        return jax.lax.with_sharding_constraint(tree, share) if mesh.size > 1 else tree

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        total, count, grads = summed(state.params, batch)
        if batch.weights is None:
            scale = 1.0 / jnp.maximum(count, 1)
            total, grads = total * scale, jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        metrics = {"loss": total, "grad_norm": optax.tree.norm(grads), "tokens": count}
        params = shared(optax.apply_updates(shared(state.params), shared(updates)))
        return TrainState(params, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def saved_form(tree: Any) -> Any:
    """A tree of arrays or shapes as checkpoints hold it: bfloat16 as float32."""
    return _cast(tree, jax.tree.map(lambda x: jnp.float32 if _is_bfloat16(x) else x.dtype, tree))


def stored_form(tree: Any, state: Any) -> Any:
    """A tree of arrays from a checkpoint, in the dtypes of `state`."""
    return _cast(tree, jax.tree.map(lambda x: x.dtype, state))


def _is_bfloat16(x: Any) -> bool:
    return x.dtype == jnp.bfloat16


def _cast(tree: Any, dtypes: Any) -> Any:
    def cast(x: Any, dtype: Any) -> Any:
        if x.dtype == dtype:
            return x
        return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)

    return jax.tree.map(cast, tree, dtypes)


def state_shardings(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    fsdp: bool,
    tables: Any = jnp.float32,
) -> tuple[TrainState, TrainState]:
    """(shapes of a train state, its shardings). `tables`: dtype of the embedding tables."""
    params = cast_tables(abstract_params(config), tables)
    param_sharding = param_shardings(config, mesh, fsdp=fsdp)
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_sharding = optimizer_shardings(opt_state, params, param_sharding, mesh)
    return TrainState(params, opt_state), TrainState(param_sharding, opt_sharding)


def init_state(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    fsdp: bool,
    seed: int,
    params: Params | None = None,
    tables: Any = jnp.float32,
) -> tuple[TrainState, TrainState]:
    """(a sharded train state, its shardings); parameters are drawn with `seed` unless given.

    `tables`: dtype of the embedding tables and of their moments.
    """
    _, shardings = state_shardings(config, optimizer, mesh, fsdp=fsdp, tables=tables)
    if params is None:
        params = jax.jit(
            lambda key: cast_tables(init_params(config, key), tables),
            out_shardings=shardings.params,
        )(jax.random.key(seed))
    params = cast_tables(params, tables)
    return TrainState(
        params, jax.jit(optimizer.init, out_shardings=shardings.optimizer)(params)
    ), shardings

"""The train step: a pure function of state and batch, how a batch is cut for it, and whether it fits into memory.

    state, metrics = step(state, inputs, targets)      jitted once, donated; gradients accumulate inside

The loss is the sum over supervised tokens divided by their number in the whole batch, across micro-batches and devices,
so how a batch is cut never changes the result.
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanochat_jax.cli import UsageError
from nanochat_jax.config import GPTConfig
from nanochat_jax.gpt import Params, abstract_params, forward, init_params
from nanochat_jax.kernels import forward_options
from nanochat_jax.loss import CHUNK_ELEMENTS, chunk_length, cross_entropy
from nanochat_jax.sharding import (
    abstract_tree,
    data_size,
    gather_over_data,
    global_batch,
    gradient_shardings,
    optimizer_shardings,
    param_shardings,
    replicated,
    sum_over_data,
)

log = logging.getLogger(__name__)

USABLE_MEMORY = {"cpu": 0.7}  # share of a device's memory that `auto` fills; elsewhere 0.92, for fragmentation


class TrainState(NamedTuple):
    params: Params
    optimizer: Any


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
    if total_batch_size % sequence_len or total_batch_size < 1:
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


def place_batch(rows: np.ndarray, shape: BatchShape, mesh: Mesh) -> Array:
    """This process's rows [R, T] as a global array [A, B, T], rows spread over the data axis."""
    return global_batch(mesh, rows.reshape(shape.accumulation, -1, shape.sequence_len), batch_axis=1)


def make_train_step(config: GPTConfig, optimizer: optax.GradientTransformation, *, dtype: Any, mesh: Mesh,
                    shardings: TrainState, remat: str = "none", attention: str = "auto") -> jax.stages.Wrapped:
    """Jitted `step(state, inputs [A, B, T], targets [A, B, T]) -> (state, {"loss", "grad_norm", "tokens"})`."""
    sharded = data_size(mesh) > 1 and any("data" in leaf.spec for leaf in jax.tree.leaves(shardings.params))
    share = gradient_shardings(config, shardings.params, mesh)
    spread = lambda tree: jax.lax.with_sharding_constraint(tree, share) if mesh.size > 1 else tree  # noqa: E731

    def micro_loss(params: Params, inputs: Array, targets: Array) -> tuple[Array, Array]:
        how = forward_options(config, mesh, dtype=dtype, length=inputs.shape[1], attention=attention)
        gather = gather_over_data(shardings.params) if sharded else None
        hidden, _ = forward(params, inputs, config=config, compute_dtype=dtype, remat=remat, gather=gather, **how)
        weight = params["lm_head"][:, : config.vocab_size]
        if gather:
            weight = gather("lm_head", weight.astype(dtype))
        chunk = chunk_length(inputs.shape[0], inputs.shape[1], config.vocab_size, mesh.shape["model"])
        total, _ = cross_entropy(hidden, weight, targets, jnp.ones(targets.shape), config.softcap, chunk)
        return total, (targets >= 0).sum()

    value_and_grad = jax.value_and_grad(micro_loss, has_aux=True)

    def summed(params: Params, inputs: Array, targets: Array) -> tuple[Array, Array, Params]:
        """Loss, tokens and gradients, each summed over rows [A, B, T]."""
        def accumulate(carry, micro_batch):
            (total, count), grads = value_and_grad(params, *micro_batch)
            if sharded:  # keeps libtpu from moving reduce-scatters out of the loop, at which it fails (0.0.42)
                grads = jax.lax.optimization_barrier(grads)
            return jax.tree.map(jnp.add, carry, (total, count, grads)), None

        if inputs.shape[0] == 1:
            (total, count), grads = value_and_grad(params, inputs[0], targets[0])
            return total, count, grads
        zeros = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(accumulate, zeros, (inputs, targets))[0]

    if data_size(mesh) > 1:
        # Each shard adds up its own gradients alone; they meet once a step, and each device gets the share it updates.
        summed = sum_over_data(summed, mesh, shardings.params, share)

    def step(state: TrainState, inputs: Array, targets: Array) -> tuple[TrainState, dict[str, Array]]:
        total, count, grads = summed(state.params, inputs, targets)
        scale = 1.0 / jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        metrics = {"loss": total * scale, "grad_norm": optax.tree.norm(grads), "tokens": count}
        params = spread(optax.apply_updates(spread(state.params), spread(updates)))
        return TrainState(params, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def state_shardings(config: GPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *, fsdp: bool
                    ) -> tuple[TrainState, TrainState]:
    """The shapes of a train state, and the tree of its shardings."""
    params, param_sharding = abstract_params(config), param_shardings(config, mesh, fsdp=fsdp)
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_sharding = optimizer_shardings(opt_state, params, param_sharding, mesh)
    return TrainState(params, opt_state), TrainState(param_sharding, opt_sharding)


def init_state(config: GPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *, fsdp: bool, seed: int,
               params: Params | None = None) -> tuple[TrainState, TrainState]:
    """A placed train state, with fresh parameters unless given, and the tree of its shardings."""
    _, shardings = state_shardings(config, optimizer, mesh, fsdp=fsdp)
    if params is None:
        params = jax.jit(lambda key: init_params(config, key), out_shardings=shardings.params)(jax.random.key(seed))
    return TrainState(params, jax.jit(optimizer.init, out_shardings=shardings.optimizer)(params)), shardings


# ------------------------------------------------------------------------------------------------------ memory


def is_out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def memory_limit() -> int | None:
    """Bytes that one device can hold; None where the backend does not say. Devices of a CPU share the machine's."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    container = Path("/sys/fs/cgroup/memory.max")
    if container.exists() and (limit := container.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return total // jax.local_device_count()


def accelerator_memory() -> int | None:
    """`memory_limit` of an accelerator; None on a CPU, whose memory is the machine's to share."""
    return None if jax.local_devices()[0].platform == "cpu" else memory_limit()


def estimate_memory(config: GPTConfig, rows: int, *, data: int, model: int = 1, remat: str, fsdp: bool, gpu: bool = False
                    ) -> float:
    """Bytes that a bfloat16 step of `rows` rows per device needs on each of `data` x `model`, about: plans (tpu/plans) need
    up to this. `gpu`: without a loop over layers and its copies of what is kept, 0.37 to 0.45 of it in plans; and the
    workspace of cuDNN."""
    matrices = config.num_block_params
    tables = config.num_params - matrices
    ways = model * (data if fsdp else 1)
    weights = 8 * (matrices + tables) + 4 * matrices + 4 * tables  # and their sums of gradients, copies, new gradients
    optimizer = (4 * matrices + 8 * tables + 24 * matrices) / (data * model)  # and what Muon works on
    whole = 2 * 4 * config.padded_vocab_size * config.n_embd if fsdp else 0  # tables that were gathered to be used
    hidden = 2 * rows * config.sequence_len * config.n_embd * (0.5 if gpu else 1.0)
    kept = {"none": 34 * config.n_layer, "elementwise": 14 * config.n_layer + 110, "block": config.n_layer + 110,
            "full": 3 * math.isqrt(config.n_layer) + 110}[remat]
    return weights / ways + optimizer + whole + hidden * kept + 3 * 4 * CHUNK_ELEMENTS


def choose_memory(config: GPTConfig, mesh: Mesh, *, rows: int | str | None, remat: str, fsdp: bool | None, limit: int | None,
                  step_rows: int = 2**30) -> tuple[int | str, str, bool]:
    """(rows per device, remat, fsdp): where one is not given ("auto", None), the fastest choice that `limit` bytes should hold.

    Nothing is recomputed if 32 rows then fit, on GPUs also 16. Else "elementwise", a tenth more products, with 32, 16 or 8
    rows; sharded, as adding up whole gradients for each such batch costs more traffic than gathering. Then "block", a third
    more products, sharded rather than with fewer rows, and "full", which recomputes twice. Without a limit: 32 rows, nothing
    recomputed or sharded.
    `step_rows` is how many rows of a step a device gets in all.
    """
    sizes = [rows if isinstance(rows, int) else 8] if rows else [32, 16, 8]
    gpu = mesh.devices.flat[0].platform == "gpu"
    choices = [("none", False, size) for size in sizes[: 2 if gpu else 1]]
    choices += [("elementwise", True, size) for size in sizes]
    choices += [(saving, spread, size) for size in sizes for saving, spread in (("block", False), ("block", True))]
    choices += [("full", True, sizes[-1])]
    for saving, spread, size in choices:
        chosen = (saving if remat == "auto" else remat, (spread if fsdp is None else fsdp) and data_size(mesh) > 1)
        needed = estimate_memory(config, max(1, min(size, step_rows)), data=data_size(mesh), model=mesh.shape["model"],
                                 remat=chosen[0], fsdp=chosen[1], gpu=gpu)
        if limit is None or needed <= limit:
            break
    if limit is not None:
        log.info("--device-batch-size %s --remat %s --fsdp %s: about %.1f of %.1f GiB", rows or size, chosen[0],
                 str(chosen[1]).lower(), needed / 2**30, limit / 2**30)
    return rows or size, *chosen


def compile_step(step_fn: jax.stages.Wrapped, state: TrainState, shape: BatchShape, mesh: Mesh) -> tuple[Callable, int]:
    """The compiled step and the bytes it needs on each device (state, batch and temporaries).

    Raises `UsageError` if that is more than a device has.
    """
    batch = jax.ShapeDtypeStruct((shape.accumulation, shape.micro_rows, shape.sequence_len), jnp.int32,
                                 sharding=NamedSharding(mesh, PartitionSpec(None, "data")))
    abstract = abstract_tree(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    try:
        compiled = step_fn.lower(abstract, batch, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):  # compilers for TPUs know beforehand
            raise out_of_memory(shape, mesh) from error
        raise
    memory = compiled.memory_analysis()
    assert memory is not None
    needed = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
              + memory.temp_size_in_bytes)
    if (limit := memory_limit()) and needed > limit:
        raise out_of_memory(shape, mesh, needed)
    return compiled, needed


def out_of_memory(shape: BatchShape, mesh: Mesh, needed: int | None = None) -> UsageError:
    rows, limit = shape.micro_rows // data_size(mesh), memory_limit()
    said = f"a step of {rows} rows of {shape.sequence_len} tokens per device does not fit into memory"
    if needed and limit:
        said += f": it needs {needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB"
    smaller = [size for size in range(1, rows // 2 + 1) if shape.rows % (size * data_size(mesh)) == 0]
    advice = f"halve --device-batch-size (try {smaller[-1]}), or " if smaller else "--device-batch-size is at its smallest; "
    return UsageError(f"{said}; {advice}give --remat block or full, --fsdp, or a smaller --depth or --max-seq-len")


def choose_batch_shape(total_batch_size: int, device_batch_size: int | str, sequence_len: int, mesh: Mesh,
                       step_fn: jax.stages.Wrapped, state: TrainState) -> BatchShape:
    """`batch_shape`; with the device batch size "auto", the largest that fits by the memory analysis of the compiled step."""
    if device_batch_size != "auto":
        return batch_shape(total_batch_size, int(device_batch_size), sequence_len, mesh)
    if (limit := memory_limit()) is None:
        raise UsageError(f"--device-batch-size auto: {jax.devices()[0].device_kind} does not tell its memory, give a number")
    usable = limit * USABLE_MEMORY.get(jax.devices()[0].platform, 0.92)
    rows = batch_shape(total_batch_size, 1, sequence_len, mesh).rows // data_size(mesh)
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    fits, first_too_large = None, len(sizes)
    low = 0
    while low < first_too_large:
        middle = (low + first_too_large) // 2
        shape = batch_shape(total_batch_size, sizes[middle], sequence_len, mesh)
        try:
            _, needed = compile_step(step_fn, state, shape, mesh)
        except UsageError:
            needed = None
        log.info("--device-batch-size %d needs %s of %.1f GiB", sizes[middle],
                 "more than there is" if needed is None else f"{needed / 2**30:.2f} GiB", usable / 2**30)
        if needed is not None and needed <= usable:
            fits, low = shape, middle + 1
        else:
            first_too_large = middle
    if fits is None:
        raise out_of_memory(batch_shape(total_batch_size, 1, sequence_len, mesh), mesh, needed)
    return fits

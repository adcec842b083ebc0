"""Memory of a training step: estimate, measurement, choice of batch size and rematerialization."""

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nanochat_jax.errors import UsageError
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.loss import CHUNK_ELEMENTS
from nanochat_jax.model.sharding import abstract_tree, data_size
from nanochat_jax.model.size import num_matrix_params, num_params
from nanochat_jax.train.step import BatchShape, TrainState, abstract_batch, batch_shape

log = logging.getLogger(__name__)

# fraction of a device's memory that `auto` fills; other platforms 0.92, for fragmentation
USABLE_MEMORY = {"cpu": 0.7}


def is_out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def memory_limit() -> int | None:
    """Bytes of memory per device; None if the backend does not report it.

    A machine's CPU devices share its memory.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    container = Path("/sys/fs/cgroup/memory.max")
    if container.exists() and (limit := container.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return total // jax.local_device_count()


def accelerator_memory() -> int | None:
    """`memory_limit` of an accelerator; None on a CPU, where it is shared."""
    return None if jax.local_devices()[0].platform == "cpu" else memory_limit()


def estimate_memory(
    config: GPTConfig,
    rows: int,
    *,
    data: int,
    model: int = 1,
    remat: str,
    fsdp: bool,
    gpu: bool = False,
) -> float:
    """Approximate bytes per device of a bfloat16 step, `rows` rows on each of `data` x `model`.

    An upper bound of what plans (tpu/plans) need. `gpu`: without the copies of saved arrays that a
    loop over layers makes (0.37 to 0.45 of the saved bytes in plans), but with cuDNN's workspace.
    """
    matrices = num_matrix_params(config)
    tables = num_params(config) - matrices
    ways = model * (data if fsdp else 1)
    # with sums of gradients, copies, new gradients
    weights = 8 * (matrices + tables) + 4 * matrices + 4 * tables
    # with Muon's temporaries
    optimizer = (4 * matrices + 8 * tables + 24 * matrices) / (data * model)
    # tables gathered for use
    gathered = 2 * 4 * config.padded_vocab_size * config.n_embd if fsdp else 0
    hidden = 2 * rows * config.sequence_len * config.n_embd * (0.5 if gpu else 1.0)
    saved = {
        "none": 34 * config.n_layer,
        "minimal": 14 * config.n_layer + 110,
        "block": config.n_layer + 110,
        "full": 3 * math.isqrt(config.n_layer) + 110,
    }[remat]
    return weights / ways + optimizer + gathered + hidden * saved + 3 * 4 * CHUNK_ELEMENTS


def choose_memory(
    config: GPTConfig,
    mesh: Mesh,
    *,
    rows: int | str | None,
    remat: str,
    fsdp: bool | None,
    limit: int | None,
    step_rows: int = 2**30,
) -> tuple[int | str, str, bool]:
    """(rows per device, remat, fsdp): the given values, else the fastest within `limit` bytes.

    Candidates for values that are "auto" or None, in this order:

      1. "none" with 32 rows, on GPUs also 16.
      2. "minimal" (a tenth more matmul work), sharded, with 32, 16 or 8 rows. Summing complete
         gradients per micro-batch would cost more traffic than gathering.
      3. "block" (a third more matmul work), sharded before fewer rows.
      4. "full", which recomputes twice.

    Without a limit: 32 rows, "none", not sharded. `step_rows`: rows per device in a complete step.
    """
    sizes = [rows if isinstance(rows, int) else 8] if rows else [32, 16, 8]
    gpu = mesh.devices.flat[0].platform == "gpu"
    choices = [("none", False, size) for size in sizes[: 2 if gpu else 1]]
    choices += [("minimal", True, size) for size in sizes]
    choices += [("block", sharded, size) for size in sizes for sharded in (False, True)]
    choices += [("full", True, sizes[-1])]
    for mode, sharded, size in choices:
        chosen = (
            mode if remat == "auto" else remat,
            (sharded if fsdp is None else fsdp) and data_size(mesh) > 1,
        )
        needed = estimate_memory(
            config,
            max(1, min(size, step_rows)),
            data=data_size(mesh),
            model=mesh.shape["model"],
            remat=chosen[0],
            fsdp=chosen[1],
            gpu=gpu,
        )
        if limit is None or needed <= limit:
            break
    if limit is not None:
        log.info(
            f"`device_batch_size={rows or size}` `remat={chosen[0]}` "
            f"`fsdp={str(chosen[1]).lower()}`: about {needed / 2**30:.1f} of "
            f"{limit / 2**30:.1f} GiB"
        )
    return rows or size, *chosen


def compile_step(
    step_fn: jax.stages.Wrapped, state: TrainState, shape: BatchShape, mesh: Mesh
) -> tuple[Callable, int]:
    """(the compiled step, bytes per device of state, batch and temporaries).

    Raises `UsageError` if a device has less memory.
    """
    abstract = abstract_tree(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    try:
        compiled = step_fn.lower(abstract, abstract_batch(shape, mesh)).compile()
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):  # TPU compilers detect it
            raise out_of_memory(shape, mesh) from error
        raise
    needed = program_bytes(compiled.memory_analysis())
    if (limit := memory_limit()) and needed > limit:
        raise out_of_memory(shape, mesh, needed)
    return compiled, needed


def program_bytes(memory: Any) -> int:
    """Bytes per device of a compiled program's arguments, results and temporaries."""
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return sizes - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def out_of_memory(shape: BatchShape | None, mesh: Mesh, needed: int | None = None) -> UsageError:
    """The error of a step that does not fit, with advice; `shape`: None if steps differ."""
    if shape is None:
        return UsageError(
            "a step does not fit into memory: halve `device_batch_size` or `num_slots`, set "
            "`remat=block`, or set `fsdp`"
        )
    rows, limit = shape.micro_rows // data_size(mesh), memory_limit()
    size = ""
    if needed and limit:
        size = f": it needs {needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB"
    smaller = [
        size for size in range(1, rows // 2 + 1) if shape.rows % (size * data_size(mesh)) == 0
    ]
    advice = (
        f"halve `device_batch_size` (try {smaller[-1]})"
        if smaller
        else "`device_batch_size` is at its smallest"
    )
    return UsageError(
        f"a step of {rows} rows of {shape.sequence_len} tokens per device does not fit into "
        f"memory{size}; {advice}, or set `remat=block` or `remat=full`, `fsdp`, or a smaller "
        "`depth` or `max_seq_len`"
    )


def choose_batch_shape(
    total_batch_size: int,
    sequence_len: int,
    device_batch_size: int | str,
    mesh: Mesh,
    step_fn: jax.stages.Wrapped,
    state: TrainState,
) -> BatchShape:
    """`batch_shape`; "auto": the largest device batch size whose compiled step fits."""
    if device_batch_size != "auto":
        return batch_shape(total_batch_size, int(device_batch_size), sequence_len, mesh)
    if (limit := memory_limit()) is None:
        raise UsageError(
            f"`device_batch_size=auto`: {jax.devices()[0].device_kind} does not report its memory; "
            "set a number"
        )
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
        size = "more than the device has" if needed is None else f"{needed / 2**30:.2f} GiB"
        log.info(f"`device_batch_size={sizes[middle]}` needs {size} of {usable / 2**30:.1f} GiB")
        if needed is not None and needed <= usable:
            fits, low = shape, middle + 1
        else:
            first_too_large = middle
    if fits is None:
        raise out_of_memory(batch_shape(total_batch_size, 1, sequence_len, mesh), mesh, needed)
    return fits

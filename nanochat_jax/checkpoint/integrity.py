"""Reading a step, and the checksums that tell whether it is what was saved."""

import gc
import json
import logging
import math
import sys
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array

from nanochat_jax.errors import UsageError, one_line
from nanochat_jax.model.sharding import gather_json
from nanochat_jax.paths import saved_steps
from nanochat_jax.storage import Directory

log = logging.getLogger(__name__)
# Orbax warns about every read-only directory.
logging.getLogger("absl").addFilter(lambda record: "is read only" not in record.getMessage())

CHECKSUMS = "checksums"  # key of the checksums in the JSON state


class Damaged(Exception):
    """A step cannot be read, or its content differs from what was saved."""


@jax.jit
def _array_checksum(array: Array) -> Array:
    array = jnp.asarray(array)
    words = jax.lax.bitcast_convert_type(
        array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    ).astype(jnp.uint32)
    position = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        stride = math.prod(array.shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride)
    return (words * (2 * position + 1)).sum(dtype=jnp.uint32)


def _checksum(tree: Any) -> int:
    """A 32-bit checksum of the tree's arrays, independent of their sharding.

    Words times odd numbers that depend on the position, added modulo 2^32: the order of additions
    does not matter, and every changed word changes the sum. One array at a time, because a CPU
    needs temporaries of the array's size.
    """
    leaves = enumerate(jax.tree.leaves(tree))
    return sum(int(_array_checksum(leaf)) * (2 * number + 1) for number, leaf in leaves) % 2**32


def structure(tree: Any) -> int:
    """CRC-32 of the names, shapes and dtypes of a tree."""
    described = [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return zlib.crc32(json.dumps(described).encode())


def _state_checksum(state: dict[str, Any]) -> int:
    content = {key: value for key, value in state.items() if key != CHECKSUMS}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def add_checksums(state: dict[str, Any], trees: dict[str, Any]) -> dict[str, Any]:
    """The JSON state of a step, with checksums of itself and of its trees."""
    sums = {
        "content": {name: _checksum(tree) for name, tree in trees.items()},
        "structure": {name: structure(tree) for name, tree in trees.items()},
        "state": _state_checksum(state),
    }
    return state | {CHECKSUMS: sums}


def read_state(directory: Directory, step: int) -> dict[str, Any]:
    """The JSON state of a step, with its checksums. Raises `Damaged`."""
    state = _read(directory, step, state=ocp.args.JsonRestore())["state"]
    if CHECKSUMS in state and state[CHECKSUMS]["state"] != _state_checksum(state):
        raise Damaged("the checksum of its state does not match")
    return state


def read_trees(
    directory: Directory, step: int, checksums: dict[str, Any], **abstract: Any
) -> dict[str, Any]:
    """Trees of a step: `params` or `optimizer`, like the given shapes and shardings.

    Raises `Damaged` if a checksum differs; steps without checksums are not verified.
    """
    items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    trees = _read(directory, step, **items)
    for name, expected in checksums.get("content", {}).items():
        if name in trees and _checksum(trees[name]) != expected:
            raise Damaged(f"the checksum of its {name} does not match")
    return trees


def newest_readable(directory: Directory, steps: list[int], read: Callable[[int], Any]) -> Any:
    """`read(step)` for the greatest of `steps` that is not damaged.

    Raises `UsageError` if all are damaged.
    """
    for step in reversed(steps):
        try:
            return read(step)
        except Damaged as error:
            log.warning("checkpoint %s cannot be read (%s)", directory / str(step), error)
    raise UsageError(
        f"none of the steps {steps} in {directory} can be read; the directory holds "
        f"{', '.join(map(str, saved_steps(directory)))}: choose another step, or delete these"
    )


def _read(directory: Directory, step: int, **items: Any) -> dict[str, Any]:
    """Items of a step (names of Orbax's arguments).

    Raises `Damaged` in all processes if one of them cannot read it.
    """
    # Each process reads its share in its own group. In a common group, the others would wait for a
    # process that fails.
    own = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
    options = ocp.CheckpointManagerOptions(
        read_only=True, save_interval_steps=0, create=False, multiprocessing_options=own
    )
    content, failure = {}, ""
    try:
        with ocp.CheckpointManager(directory, options=options) as manager:
            content = dict(manager.restore(step, args=ocp.args.Composite(**items)).items())
    except Exception as error:  # Orbax raises many types for damaged data
        if "RESOURCE_EXHAUSTED" in str(error):  # memory ran out: the step is not damaged
            raise
        failure = one_line(error).partition(" See full TensorStore details")[0]
    if failure:
        _drop_readers()
    for index, text in enumerate(gather_json(failure)):
        if text:
            raise Damaged(f"process {index}: {text}" if jax.process_count() > 1 else text)
    return content


def _drop_readers() -> None:
    """Collect Orbax's failed readers silently.

    They hold unretrieved errors, which Python would print at the next garbage collection.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook

"""The mesh, and which logical axis is sharded over which mesh axis.

A mesh is DxM: D-way data parallelism, M-way tensor ("model") parallelism. Weights declare logical
axes (weights.py), and `RULES` maps those to mesh axes. Optimizer state is always sharded over the
data axis too.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanochat_jax.errors import UsageError
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import LAYERS, VALUE_LAYERS, Params, abstract_params, logical_axes

AXES = ("data", "model")
RULES = {
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "vocab": "model",
    "embed": None,
    "rows": None,
    LAYERS: None,
    VALUE_LAYERS: None,
    None: None,
}
FSDP_RULES = RULES | {"embed": "data", "rows": "data"}


def make_mesh(text: str = "auto", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh for "8x1", "4x2", ...; "auto": all devices on the data axis.

    Several TPU slices split the data axis into consecutive parts, because the network between
    slices is much slower than the links within one.
    """
    devices = jax.devices() if devices is None else devices
    data, model = mesh_shape(
        text, len(devices), devices[0].platform, all_of_them=jax.process_count() > 1
    )
    devices, kinds = devices[: data * model], (AxisType.Auto,) * 2
    # GPUs have slices too, their hosts; any mesh works there.
    on_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if slices == 1:
        return jax.make_mesh((data, model), AXES, axis_types=kinds, devices=devices)
    if data % slices:
        raise UsageError(
            f"`mesh={data}x{model}`: {data}-way data parallelism cannot be split over {slices} "
            "slices; choose a multiple of them"
        )
    grid = mesh_utils.create_hybrid_device_mesh((data // slices, model), (slices, 1), devices)
    return Mesh(grid, AXES, axis_types=kinds)


def mesh_shape(
    text: str, count: int, platform: str, *, all_of_them: bool = False
) -> tuple[int, int]:
    """(data, model) of "8x1" or "auto" on `count` devices.

    Raises `UsageError` for a malformed `text` or an unsuitable number of devices.
    """
    if text == "auto":
        return count, 1
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or 0 in (data := int(match[1]), model := int(match[2])):
        raise UsageError(f"`mesh` {text!r} is not of the form DxM, such as 8x1 (or auto)")
    needed = data * model
    if needed > count or (all_of_them and needed != count):
        flags = f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        hint = f"; to try a mesh on a CPU set {flags}"
        raise UsageError(
            f"`mesh={text}` needs {needed} devices, found {count} ({platform}): choose a mesh that "
            f"fits, or auto{hint if platform == 'cpu' else ''}"
        )
    return data, model


def data_size(mesh: Mesh) -> int:
    return mesh.shape["data"]


def mesh_text(mesh: Mesh) -> str:
    """The mesh as in `mesh=8x1`."""
    return "x".join(map(str, mesh.shape.values()))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: dict
) -> PartitionSpec:
    """Mesh axes of one weight. An axis is not sharded if the mesh axis does not divide its size."""
    names = [rules[axis] for axis in axes]
    used = [name for name in names if name]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} put one mesh axis on two dimensions: {names}")
    return PartitionSpec(
        *(
            name if name and size % mesh.shape[name] == 0 else None
            for name, size in zip(names, shape)
        )
    )


def param_shardings(config: GPTConfig, mesh: Mesh, *, fsdp: bool = False) -> Any:
    """A tree of `NamedSharding`s like the parameters'."""
    if config.n_kv_head % mesh.shape["model"]:
        raise UsageError(
            f"{config.n_kv_head} key/value heads cannot be split over a model axis of "
            f"{mesh.shape['model']}: choose a `mesh` DxM whose M divides them"
        )
    rules = FSDP_RULES if fsdp else RULES
    shapes = abstract_params(config)
    return jax.tree.map(
        lambda leaf, axes: NamedSharding(mesh, _spec(axes, leaf.shape, mesh, rules)),
        shapes,
        logical_axes(config),
    )


def optimizer_shardings(opt_state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer state: the parameter's, also over the data axis if that divides.

    A leaf belongs to the parameter whose path is the end of the leaf's path (optax keeps the
    parameters' tree inside its states).
    """
    by_path = {}
    jax.tree.map_with_path(
        lambda path, p, s: by_path.update({_keys(path): (p.shape, s.spec)}), params, shardings
    )
    longest = max(len(path) for path in by_path)

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        keys = _keys(path)
        for length in range(longest, 0, -1):
            if keys[-length:] in by_path:
                shape, spec = by_path[keys[-length:]]
                if shape == leaf.shape:
                    return NamedSharding(mesh, _add_data_axis(spec, leaf.shape, mesh))
        return replicated(mesh)

    return jax.tree.map_with_path(sharding, opt_state)


def gradient_shardings(config: GPTConfig, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of gradients: the parameters', also over the data axis."""
    return jax.tree.map(
        lambda leaf, sharding: NamedSharding(mesh, _add_data_axis(sharding.spec, leaf.shape, mesh)),
        abstract_params(config),
        shardings,
    )


def _data_axis(spec: PartitionSpec) -> int | None:
    return list(spec).index("data") if "data" in spec else None


def gather_over_data(shardings: Params) -> Callable[[str, jax.Array], jax.Array]:
    """`gather(name, weight)` for code that runs per data shard: the complete weight.

    The weight is a layer's or the model's, sharded over the data axis by `shardings`. Its gradient
    is summed over the shards, and each shard receives its part.
    """
    axes = {}
    jax.tree.map_with_path(
        lambda path, leaf: axes.update({_keys(path)[-1]: (_data_axis(leaf.spec), len(leaf.spec))}),
        shardings,
    )

    def gather(name: str, weight: jax.Array) -> jax.Array:
        axis, ndim = axes[name]
        if axis is None:
            return weight
        # a layer's weight lacks the first axis
        return jax.lax.all_gather(weight, "data", axis=axis - (ndim - weight.ndim), tiled=True)

    return gather


def sum_over_data(
    f: Callable[..., tuple[jax.Array, jax.Array, Params]], mesh: Mesh, params: Any, share: Any
) -> Callable:
    """`f(params, batch) -> (total, count, gradients)` run per data shard, results summed.

    The arrays of the batch are [A, B, T]. `params` are the shardings of the parameters, `share`
    those of the gradients. `f` must gather parameters that are sharded over the data axis, which
    sums their gradients.
    """
    # Axes of size 1 are manual too: if all axes are manual, kernels run unchanged.
    manual = {axis for axis in mesh.axis_names if axis == "data" or mesh.shape[axis] == 1}
    only_manual = lambda tree: jax.tree.map(  # noqa: E731
        lambda leaf: PartitionSpec(*(axis if axis in manual else None for axis in leaf.spec)), tree
    )

    def collect(gradient: jax.Array, before: NamedSharding, after: NamedSharding) -> jax.Array:
        if _data_axis(before.spec) is not None:
            return gradient
        axis = _data_axis(after.spec)
        if axis is None:
            return jax.lax.psum(gradient, "data")
        return jax.lax.psum_scatter(gradient, "data", scatter_dimension=axis, tiled=True)

    def shard(tree: Params, batch: Any) -> tuple[jax.Array, jax.Array, Params]:
        total, count, gradients = f(tree, batch)
        total, count = jax.lax.psum((total, count), "data")
        return total, count, jax.tree.map(collect, gradients, params, share)

    rows, replica = PartitionSpec(None, "data"), PartitionSpec()
    return jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(only_manual(params), rows),
        axis_names=manual,
        check_vma=False,
        out_specs=(replica, replica, only_manual(share)),
    )


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def _add_data_axis(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axes = list(spec) + [None] * (len(shape) - len(spec))
    if "data" not in axes:
        free = [
            i
            for i, axis in enumerate(axes)
            if axis is None and shape[i] % mesh.shape["data"] == 0 and shape[i] > 1
        ]
        if free:
            axes[max(free, key=lambda i: shape[i])] = "data"
    return PartitionSpec(*axes)


def abstract_tree(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree's arrays, as `ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def data_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process holds the index-th of `count` equal parts of a batch's rows.

    Processes whose devices differ only along the model axis hold the same part.
    """
    mine = [
        row
        for row, devices in enumerate(mesh.devices)
        if any(d.process_index == jax.process_index() for d in devices)
    ]
    first, size, rows = mine[0], len(mine), mesh.shape["data"]
    if mine != list(range(first, first + size)) or rows % size or first % size:
        raise UsageError(
            f"`mesh={mesh_text(mesh)}`: the devices of one process must be neighbors on the data "
            f"axis, these are at {mine}: choose a model axis that divides the devices of a host"
        )
    return first // size, rows // size


def global_batch(mesh: Mesh, local: np.ndarray, *, batch_axis: int) -> jax.Array:
    """A global array of this process's rows, sharded over the data axis along `batch_axis`."""
    spec: list[str | None] = [None] * local.ndim
    spec[batch_axis] = "data"
    shape = list(local.shape)
    shape[batch_axis] *= data_share(mesh)[1]
    return jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec(*spec)), local, tuple(shape)
    )


def spread_rows(mesh: Mesh, rows: np.ndarray, *, axis: int = 0) -> jax.Array:
    """A global array, sharded over the data axis along `axis`, of rows that all processes have."""
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def barrier(name: str) -> None:
    """Wait for all processes of the run."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather_json(value: Any) -> list[Any]:
    """The JSON value of each process, in process order, on every process."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data), np.int32)).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    return [
        json.loads(row[:size].tobytes())
        for row, size in zip(multihost_utils.process_allgather(padded), sizes)
    ]

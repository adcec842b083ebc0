"""Whether the device and its kernels compute what they should, and the rates that bound the
rest.
"""

import functools
import importlib.metadata
import math
import platform
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from benchmarks.gpu import program
from benchmarks.gpu.plan import Size
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.timing import has_gpu, seconds_per_call
from nanochat_jax.model.attention import choose_kernel, self_attention
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.kernels import SAVE_MATMULS
from nanochat_jax.model.sharding import make_mesh

PACKAGES = ("jax", "flax", "optax", "numpy", "torch", "nvidia-", "triton")
ATTENTION_LIMIT = 0.008  # rounding to bfloat16 gives 0.0023, a window off by one 0.017 or more
LOSS_LIMIT = 0.05  # nats; rounding to bfloat16 moves the loss of a fresh model by less


def device(record: Recorder, size: Size) -> None:
    """Versions, eager arithmetic, matmul rate and copy bandwidth."""
    chip = jax.devices()[0]
    if chip.platform == "cpu" and not size.tiny:
        raise RuntimeError("JAX finds no GPU; give --tiny for a rehearsal on the CPU")
    versions = {
        dist.metadata["Name"]: dist.version
        for dist in importlib.metadata.distributions()
        if (dist.metadata["Name"] or "").lower().startswith(PACKAGES)
    }
    record(
        "device",
        kind=chip.device_kind,
        platform=chip.platform,
        count=jax.device_count(),
        python=platform.python_version(),
        jax=jax.__version__,
        backend=chip.client.platform_version,
        bytes_limit=program.memory_limit(),
        peak_flops=program.peak_flops(chip),
        peak_bandwidth=program.peak_bandwidth(chip),
        versions=versions,
        driver=nvidia_smi(),
    )

    root, added = float(jnp.sqrt(512.0)), np.asarray(jnp.ones(4) + 1).tolist()
    record(
        "eager",
        sqrt_512=root,
        ones_plus_1=added,
        ok=abs(root - math.sqrt(512.0)) < 1e-3 and added == [2.0] * 4,
    )

    side = size.matmul
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in (0, 1))
    matmul = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.bfloat16))
    seconds = seconds_per_call(lambda: matmul(a, b), 20)
    rate, peak = 2 * side**3 / seconds, program.peak_flops(chip)
    record(
        "matmul",
        dtype="bfloat16",
        side=side,
        ms=1e3 * seconds,
        tflops=rate / 1e12,
        share_of_peak=peak and rate / peak,
    )

    source = jnp.zeros(size.copy_bytes // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds = seconds_per_call(lambda: copy(source), 5)
    rate, peak = 2 * size.copy_bytes / seconds, program.peak_bandwidth(chip)
    record(
        "copy", bytes=size.copy_bytes, gb_per_second=rate / 1e9, share_of_peak=peak and rate / peak
    )


def nvidia_smi() -> str | None:
    """Driver, memory, clocks and power limit as nvidia-smi prints them."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,pstate"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=10,
    )
    return done.stdout.strip() or done.stderr.strip()


# ---------------------------------------------------------------------------------- attention


def dense_attention(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Causal attention with all scores in memory: the reference. q [B, T, H, h]; k, v [B, T, K,
    h].
    """
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    visible = (distance >= 0) & (distance <= (length if window is None else window))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def with_gradients(attend: Callable[..., Array], arrays: list[Array]) -> list[Array]:
    """Output and gradients of attention for [q, k, v, cotangent of the output]."""

    @jax.jit
    def run(q: Array, k: Array, v: Array, cotangent: Array) -> tuple[Array, ...]:
        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(cotangent)

    return list(run(*arrays))


def relative_errors(
    attend: Callable[..., Array], window: int | None, arrays: list[Array]
) -> dict[str, float]:
    """|actual - expected| / |expected| of the output and the three gradients."""
    actual = with_gradients(functools.partial(attend, window=window), arrays)
    with jax.default_matmul_precision("highest"):
        expected = with_gradients(
            functools.partial(dense_attention, window=window),
            [array.astype(jnp.float32) for array in arrays],
        )
    names = ("out", "d_q", "d_k", "d_v")
    return {
        name: float(
            jnp.linalg.norm((b.astype(jnp.float32) - a).ravel()) / jnp.linalg.norm(a.ravel())
        )
        for name, a, b in zip(names, expected, actual, strict=True)
    }


def attention(record: Recorder, size: Size) -> None:
    """The attention that training chooses against the reference in float32."""
    mesh = make_mesh("1x1", [jax.devices()[0]])
    if not has_gpu():
        record("cudnn", value="no GPU")

    compute = Compute.on(mesh, dtype=jnp.bfloat16)
    chosen = functools.partial(self_attention, compute=compute)

    def sharded(q: Array, k: Array, v: Array, *, window: int | None) -> Array:
        spec = PartitionSpec("data", None, "model", None)
        attend = functools.partial(chosen, window=window)
        return jax.shard_map(
            attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
        )(q, k, v)

    def recomputed(q: Array, k: Array, v: Array, *, window: int | None) -> Array:
        attend = functools.partial(chosen, window=window)
        return jax.checkpoint(attend, policy=SAVE_MATMULS)(q, k, v)

    heads = size.attention_heads
    longest = max(size.attention_lengths)
    cases = [
        (length, heads, window, "plain")
        for length in size.attention_lengths
        for window in (None, length // 4)
    ]
    cases += [
        (longest, heads // 2, longest // 4, how) for how in ("plain", "shard_map", "checkpoint")
    ]
    for length, kv_heads, window, how in cases:
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = [
            jax.random.normal(key, (2, length, count, 128), jnp.bfloat16)
            for key, count in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
        ]
        attend = {"plain": chosen, "shard_map": sharded, "checkpoint": recomputed}[how]
        errors = relative_errors(attend, window, arrays)
        record(
            "relative error",
            kernel=choose_kernel(compute, arrays[0]),
            length=length,
            window=window,
            heads=f"{heads}/{kv_heads}",
            how=how,
            **errors,
            ok=max(errors.values()) < ATTENTION_LIMIT,
        )


# ------------------------------------------------------------------------------------- repeat


def repeat(record: Recorder, size: Size) -> None:
    """Five steps of a small modern model, twice, and on the CPU in float32."""
    config = program.modern_config(size.check_depth, size, sequence=size.check_sequence)
    training = program.Training(config, rows=2, accumulation=size.accumulation)
    losses, states = five_steps_twice(training)
    record("losses", depth=size.check_depth, dtype=str(training.dtype), losses=losses[0])
    leaves = [jax.tree_util.tree_leaves_with_path(state) for state in states]
    differing = [
        jax.tree_util.keystr(path)
        for (path, a), (_, b) in zip(*leaves, strict=True)
        if not np.array_equal(a, b)
    ]
    record(
        "same bits",
        same=losses[0] == losses[1] and not differing,
        differing=differing,
        of=len(leaves[0]),
    )
    if not has_gpu():
        record("against the CPU", value="no GPU")
        return
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        on_cpu = program.Training(
            config, rows=2, accumulation=size.accumulation, device=cpu, dtype_name="float32"
        )
        expected = steps(on_cpu, *compiled(on_cpu))[0]
    difference = max(abs(a - b) for a, b in zip(losses[0], expected, strict=True))
    record(
        "against the CPU",
        losses=expected,
        largest_difference=difference,
        ok=difference < LOSS_LIMIT,
    )


def compiled(training: program.Training) -> tuple[Any, Any]:
    state = training.new_state()
    step, _, _ = training.compile(state)
    return step, state


def steps(training: program.Training, step: Any, state: Any) -> tuple[list[float], Any]:
    """Losses of five steps, and the parameters and optimizer state after them, on the host."""
    batch, losses = training.batch(), []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state)


def five_steps_twice(training: program.Training) -> tuple[list[list[float]], list[Any]]:
    step, state = compiled(training)
    first = steps(training, step, state)
    second = steps(training, step, training.new_state())
    return [first[0], second[0]], [first[1], second[1]]

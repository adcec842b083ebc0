"""The fused kernels compute what the reference attention does."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from nanochat_jax.errors import UsageError
from nanochat_jax.model import kernels
from nanochat_jax.model.attention import causal_attention, check_attention, choose_kernel
from nanochat_jax.model.compute import Compute, resolve_dtype
from nanochat_jax.model.kernels import cudnn_attention, splash_attention
from nanochat_jax.model.sharding import make_mesh


def draw(length, heads, kv_heads, width, batch=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [
        (batch, length, heads, width),
        *[(batch, length, kv_heads, width)] * 2,
        (batch, length, heads, width),
    ]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def compare(attend, q, k, v, cotangent, window, tolerance):
    """Outputs and gradients of all three, against the reference in float32."""
    wide = [each.astype(jnp.float32) for each in (q, k, v, cotangent)]

    @functools.partial(jax.jit, static_argnums=0)
    def both_passes(attend, q, k, v, cotangent):
        out, backward = jax.vjp(lambda *qkv: attend(*qkv, window=window), q, k, v)
        return out, *backward(cotangent)

    expected, found = both_passes(causal_attention, *wide), both_passes(attend, q, k, v, cotangent)
    for one, other in zip(expected, found):
        np.testing.assert_allclose(
            np.asarray(other, np.float32), one, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize(
    "length, heads, kv_heads, width, window",
    [
        (256, 2, 2, 128, None),
        (512, 2, 2, 128, 128),
        (384, 2, 2, 64, 200),  # neither blocks nor the window are powers of two
        (256, 4, 2, 128, 128),  # grouped queries
        (256, 2, 2, 128, 255),  # the window is the whole row
        (256, 2, 2, 128, 1000),
        (256, 2, 1, 64, 0),  # each token sees itself alone
    ],
)
def test_splash_equals_the_reference(length, heads, kv_heads, width, window):
    mesh = make_mesh("1x1", jax.devices()[:1])
    attend = lambda q, k, v, *, window: splash_attention(
        q, k, v, window=window, mesh=mesh, interpret=True
    )  # noqa: E731
    compare(attend, *draw(length, heads, kv_heads, width), window, 2e-5)


def test_splash_takes_the_place_of_the_reference_inside_jit_and_remat():
    mesh = make_mesh("1x1", jax.devices()[:1])
    q, k, v, _ = draw(128, 2, 2, 128)

    def total(attend, q):
        return (jax.checkpoint(lambda q: attend(q, k, v, window=64))(q) ** 2).sum()

    splash = lambda q, k, v, *, window: splash_attention(
        q, k, v, window=window, mesh=mesh, interpret=True
    )  # noqa: E731
    for _ in range(2):
        found = jax.jit(jax.grad(lambda q: total(splash, q)))(q)
    np.testing.assert_allclose(
        found, jax.grad(lambda q: total(causal_attention, q))(q), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "kind, length, message", [("splash", 256, "TPUs only"), ("cudnn", 256, "NVIDIA")]
)
def test_a_kernel_asked_for_by_name_never_falls_back(kind, length, message):
    mesh = make_mesh("1x1", jax.devices()[:1])
    with pytest.raises(UsageError, match=message):
        check_attention(
            Compute.on(mesh, dtype="bfloat16", attention=kind), length=length, head_dim=128
        )


def test_the_choice_follows_device_dtype_and_shape():
    class Device:
        def __init__(self, platform, version=""):
            self.platform, self.client = platform, type("Client", (), {"platform_version": version})

    class FakeMesh:
        def __init__(self, device):
            self.devices = np.array([device])

    def name(device, dtype=jnp.bfloat16, length=2048, head_dim=128):
        queries = jax.ShapeDtypeStruct((1, length, 1, head_dim), dtype)
        return choose_kernel(Compute.on(FakeMesh(device), dtype=dtype), queries)

    assert name(Device("tpu")) == "splash"
    assert name(Device("tpu"), length=1000) == "xla"
    assert name(Device("gpu", "cuda 12090")) == name(Device("cuda")) == "cudnn"
    assert name(Device("cuda"), dtype=jnp.float32) == "xla"
    assert name(Device("gpu", "rocm 70000")) == name(Device("cpu")) == "xla"

    def loops(device):
        return Compute.on(FakeMesh(device)).scan

    assert (
        loops(Device("tpu")) and not loops(Device("gpu", "cuda 12090")) and not loops(Device("cpu"))
    )


def test_where_cudnn_fails_a_warning_names_the_error_and_xla_attention_is_used(monkeypatch, caplog):
    # On a CPU, cuDNN attention does fail.
    monkeypatch.setattr(kernels, "cuda_capability", lambda device: 9.0)
    assert Compute.on(None, dtype="bfloat16").attention == "xla"
    assert re.search(r"cuDNN attention fails \(.*cudnn.*\): using XLA's", caplog.text, re.I)
    with pytest.raises(UsageError, match=r"`attention=cudnn`: cuDNN fails \(.*choose xla or auto"):
        Compute.on(None, dtype="bfloat16", attention="cudnn")
    monkeypatch.setattr(kernels, "cudnn_failure", lambda: None)
    assert Compute.on(None, dtype="bfloat16").attention == "auto"


def test_the_dtype_follows_the_device_unless_the_environment_names_it(monkeypatch):
    class Gpu:
        platform, client = "gpu", SimpleNamespace(platform_version="cuda 13000")

        def __init__(self, capability):
            self.compute_capability = capability

    devices = [Gpu("7.5"), Gpu("8.0"), Gpu("10.0"), jax.devices()[0]]
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    assert [str(resolve_dtype("auto", device)) for device in devices] == [
        "float32",
        "bfloat16",
        "bfloat16",
        "float32",
    ]
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    assert resolve_dtype("auto", devices[0]) == jnp.bfloat16
    assert resolve_dtype("float32", devices[1]) == jnp.float32
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    with pytest.raises(UsageError, match="NANOCHAT_DTYPE=float16: expected float32 or bfloat16"):
        resolve_dtype("auto")


@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="cuDNN attention runs on NVIDIA GPUs only"
)
@pytest.mark.parametrize("window", [None, 128, 512])
def test_cudnn_equals_the_reference(window):
    attend = functools.partial(cudnn_attention, mesh=make_mesh("1x1", jax.devices()[:1]))
    compare(attend, *draw(1024, 4, 2, 128, dtype=jnp.bfloat16), window, 3e-2)


@pytest.mark.skipif(
    jax.device_count() < 2,
    reason="needs several devices: XLA_FLAGS=--xla_force_host_platform_device_count=4",
)
def test_splash_on_a_mesh_equals_the_reference():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    attend = lambda q, k, v, *, window: splash_attention(
        q, k, v, window=window, mesh=mesh, interpret=True
    )  # noqa: E731
    compare(attend, *draw(256, 4, 2, 64), 128, 2e-5)
    # a row and heads that do not divide
    compare(attend, *(each[:1] for each in draw(256, 3, 3, 64)), 128, 2e-5)
    # as the train step calls it: on each data shard, the heads still whole
    rows = PartitionSpec("data")
    inside = lambda *qkv, window: jax.shard_map(
        functools.partial(attend, window=window),
        mesh=mesh,
        in_specs=(rows,) * 3,  # noqa: E731
        out_specs=rows,
        axis_names={"data"},
        check_vma=False,
    )(*qkv)
    compare(inside, *draw(256, 4, 2, 64), 128, 2e-5)

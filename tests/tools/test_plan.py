"""Plans count what programs do, and real steps compile for TPUs that are not there."""

import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding, PartitionSpec

from nanochat_jax.devices import DETERMINISTIC
from nanochat_jax.errors import UsageError
from nanochat_jax.metrics import PEAKS
from nanochat_jax.model.attention import causal_attention
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.gpt import forward
from nanochat_jax.model.kernels import cudnn_attention
from nanochat_jax.model.loss import Batch
from nanochat_jax.model.sharding import abstract_tree, make_mesh
from nanochat_jax.model.size import num_params, num_scaling_params
from nanochat_jax.model.weights import abstract_params
from nanochat_jax.train.memory import choose_memory, estimate_memory
from nanochat_jax.train.optim import OptimizerConfig, Schedules, constant, make_optimizer
from nanochat_jax.train.step import make_train_step, state_shardings
from tpu.compile import (
    CHIPS,
    DoesNotFit,
    Memory,
    Plan,
    assumed_cudnn,
    largest_batch,
    topology_devices,
)
from tpu.cost import HloCost, hlo_cost, jaxpr_flops, visible_pairs
from tpu.cycles import Kernel, estimated_kernels
from tpu.hlo import parse_hlo

CONFIG = GPTConfig.modern(1, sequence_len=64, vocab_size=64)


@pytest.mark.parametrize("length, window", [(7, None), (7, 0), (7, 3), (7, 6), (7, 100)])
def test_visible_pairs_are_those_of_the_mask(length, window):
    distance = np.arange(length)[:, None] - np.arange(length)
    assert (
        visible_pairs(length, window)
        == ((distance >= 0) & (distance <= (length if window is None else window))).sum()
    )


def flops_on(platform, f, *arguments, config=CONFIG):
    return jaxpr_flops(jax.make_jaxpr(f)(*arguments), config, platform=platform)


def test_products_inside_loops_count_once_a_round():
    weight = jnp.ones((32, 16))

    def step(x):
        return jax.lax.scan(
            lambda carry, _: (jnp.tanh(carry @ weight) @ weight.T, None), x, length=5
        )[0].sum()

    forward = 5 * 2 * (2 * 8 * 32 * 16)
    x = jnp.ones((8, 32))
    assert flops_on("cpu", step, x) == forward
    # Of the backward pass only the products with the cotangents: the weight is a constant.
    assert flops_on("cpu", jax.grad(step), x) == 2 * forward
    assert flops_on("cpu", jax.grad(jax.checkpoint(step)), x) == 3 * forward


def test_the_planned_platforms_code_counts_and_of_a_condition_the_dearer_branch():
    def products(count):
        return lambda x: functools.reduce(lambda y, _: jnp.tanh(y @ weight), range(count), x)

    def step(x):
        return jax.lax.platform_dependent(
            x, cpu=products(3), tpu=products(1), default=products(2)
        ).sum()

    x, weight = jnp.ones((8, 8)), jnp.ones((8, 8))
    one = 2 * 8**3
    assert [flops_on(name, step, x) / one for name in ("cpu", "tpu", "cuda")] == [3, 1, 2]
    # Forward, forward again, backward.
    assert [
        flops_on(name, jax.grad(jax.checkpoint(step)), x) / one for name in ("cpu", "tpu", "cuda")
    ] == [9, 3, 6]
    assert (
        flops_on("cpu", lambda x: jax.lax.cond(x[0, 0] > 0, products(1), products(2), x), x)
        == 2 * one
    )


@pytest.mark.parametrize("window", [None, 3])
def test_attention_by_cudnn_counts_for_what_its_mask_leaves(window):
    distance = np.arange(16)[:, None] - np.arange(16)
    visible = ((distance >= 0) & (distance <= (16 if window is None else window))).sum()
    attend = functools.partial(cudnn_attention, window=window, mesh=make_mesh("8x1"))
    total = lambda *x: attend(*x).astype(jnp.float32).sum()  # noqa: E731
    q, kv = jnp.ones((8, 16, 4, 8), jnp.bfloat16), jnp.ones((8, 16, 2, 8), jnp.bfloat16)
    with assumed_cudnn():
        forward, both = (
            flops_on("cuda", f, q, kv, kv) for f in (total, jax.grad(total, argnums=(0, 1, 2)))
        )
    product = 2 * 8 * 4 * 8 * visible  # of 8 rows and 4 heads of 8
    assert (forward, both) == (2 * product, (2 + 5) * product)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_only_attention_and_products_but_the_hidden_layers_are_kept_from_being_recomputed(platform):
    attention = (
        causal_attention
        if platform == "tpu"
        else functools.partial(cudnn_attention, mesh=make_mesh("1x1"))
    )
    config = GPTConfig.modern(2, sequence_len=64, vocab_size=64)
    tokens = jnp.zeros((1, 64), jnp.int32)

    def flops(remat):
        def total(params):
            return forward(
                params,
                tokens,
                config,
                Compute(dtype=jnp.bfloat16, remat=remat, attention=attention),
            )[0].sum()

        with assumed_cudnn():
            return flops_on(platform, jax.grad(total), abstract_params(config), config=config)

    hidden = 2 * 2 * 64 * 4 * config.n_embd**2  # of the MLP, in two layers
    assert flops("minimal") == flops("none") + hidden < 0.95 * flops("block")


def compiled_text(f, *arguments):
    return jax.jit(f).lower(*arguments).compile().as_text()


def test_low_precision_matmuls_are_counted_in_the_jaxpr_and_in_the_compiled_loop():
    weight, plain = jnp.ones((64, 64), jnp.int8), jnp.ones((64, 64))

    def step(x):
        def body(carry, _):
            sums = jnp.dot(carry, weight, preferred_element_type=jnp.int32)
            return (sums // 64).astype(jnp.int8), sums.astype(jnp.float32) @ plain

        return jax.lax.scan(body, x, length=5)[1]

    one, x = 2 * 64**3, jnp.ones((64, 64), jnp.int8)
    jaxpr = jax.make_jaxpr(step)(x)
    total, low = (
        jaxpr_flops(jaxpr, CONFIG, platform="cpu", low_precision=only) for only in (False, True)
    )
    assert (total, low) == (10 * one, 5 * one)
    assert hlo_cost(compiled_text(step, x)).low_precision == 5


def test_every_instruction_of_a_module_is_parsed():
    text = compiled_text(
        lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.sort(y @ y), x), jnp.ones((16, 16))
    )
    computations, entry = parse_hlo(text)
    assert entry in computations
    assert sum(map(len, computations.values())) == sum(
        " = " in line and line.startswith("  ") for line in text.splitlines()
    )


def test_traffic_grows_with_the_rounds_of_a_loop():
    def traffic(rounds):
        def body(x, _):
            return jnp.sort(x, axis=0), None  # nothing that could be fused with the next round

        return hlo_cost(
            compiled_text(lambda x: jax.lax.scan(body, x, length=rounds)[0], jnp.ones((64, 64)))
        ).hbm_bytes

    one_round = (traffic(20) - traffic(10)) / 10
    assert one_round >= 2 * 64 * 64 * 4 and traffic(40) == pytest.approx(
        traffic(20) + 20 * one_round
    )


def test_traffic_is_that_of_whole_tiles_of_slices_and_of_what_is_updated():
    """Hand-written: XLA for a CPU has neither tiles nor fusions inside of fusions."""
    text = """HloModule counted

inner (p0: f32[100,8,128], p1: s32[]) -> f32[1,8,128] {
  %p0 = f32[100,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %half = f32[50,8,128]{2,1,0:T(8,128)} slice(%p0), slice={[0:50], [0:8], [0:128]}
  ROOT %slice = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%half, %p1, %zero, %zero), \
dynamic_slice_sizes={1,8,128}
}

outer (q0: f32[100,8,128], q1: s32[], q2: f32[50,8,128]) -> f32[50,8,128] {
  %q2 = f32[50,8,128]{2,1,0:T(8,128)} parameter(2)
  %q0 = f32[100,8,128]{2,1,0:T(8,128)} parameter(0)
  %q1 = s32[]{:T(128)S(6)} parameter(1)
  %one = f32[1,8,128]{2,1,0:T(8,128)} fusion(%q0, %q1), kind=kLoop, calls=%inner
  %none = s32[]{:T(128)} constant(0)
  ROOT %put = f32[50,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%q2, %one, %q1, %none, %none)
}

scattered (r0: f32[50,8,128], r1: f32[1,8,128], r2: s32[1]) -> f32[50,8,128] {
  %r0 = f32[50,8,128]{2,1,0:T(8,128)} parameter(0)
  %r1 = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
  %r2 = s32[1]{0:T(128)} parameter(2)
  ROOT %written = f32[50,8,128]{2,1,0:T(8,128)} scatter(%r0, %r2, %r1), \
update_window_dims={1,2}, to_apply=%last
}

ENTRY %main (x: f32[100,8,128], i: s32[], y: f32[8,64]) -> f32[8,64] {
  %x = f32[100,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %y = f32[8,64]{1,0:T(8,128)} parameter(2)
  %empty = f32[50,8,128]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %filled = f32[50,8,128]{2,1,0:T(8,128)} fusion(%x, %i, %empty), kind=kLoop, calls=%outer
  %new = f32[1,8,128]{2,1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %at = s32[1]{0:T(128)S(6)} custom-call(), custom_call_target="AllocateBuffer"
  %more = f32[50,8,128]{2,1,0:T(8,128)} fusion(%filled, %new, %at), kind=kCustom, calls=%scattered
  %near = f32[8,64]{0,1:T(8,128)S(1)} copy(%y)
  ROOT %back = f32[8,64]{1,0:T(8,128)} copy(%y)
}
"""
    tile = 8 * 128 * 4
    # Half a tile of values lies in a whole one; what is copied to the chip (S(1)) is only read. A
    # tile is sliced off and written, another scattered from the chip.
    assert hlo_cost(text).traffic == {"element-wise": 3 * tile, "copies": tile + 2 * tile}


def test_collectives_count_what_a_device_sends():
    mesh = make_mesh("8x1")
    spread, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=spread)
    gather = hlo_cost(jax.jit(lambda x: x, out_shardings=whole).lower(x).compile().as_text())
    assert gather.calls == {"all-gather": 1} and gather.sent["all-gather"] == 64 * 128 * 4 * 7 / 8
    reduce = hlo_cost(
        jax.jit(lambda x: x.sum(axis=0), out_shardings=whole).lower(x).compile().as_text()
    )
    assert reduce.calls == {"all-reduce": 1} and reduce.sent["all-reduce"] == 128 * 4 * 2 * 7 / 8


def traced_step(mesh, config, *, accumulation, fsdp=False):
    compute, schedules = (
        Compute.on(mesh, dtype="float32"),
        Schedules(lr_multiplier=constant(1.0), momentum=constant(0.9)),
    )
    optimizer = make_optimizer(config, OptimizerConfig(), schedules, compute)
    state, shardings = state_shardings(config, optimizer, mesh, fsdp=fsdp)
    step = make_train_step(config, optimizer, compute, shardings)
    rows = jax.ShapeDtypeStruct(
        (accumulation, 8, config.sequence_len),
        jnp.int32,
        sharding=NamedSharding(mesh, PartitionSpec(None, "data")),
    )
    state = abstract_tree(state, shardings)
    return step.trace(state, Batch(rows, rows))


def test_devices_exchange_gradients_once_a_step_however_the_batch_is_cut():
    mesh, config = make_mesh("8x1"), GPTConfig.modern(2, sequence_len=128, vocab_size=256)
    once, four = (
        hlo_cost(traced_step(mesh, config, accumulation=count).lower().compile().as_text())
        for count in (1, 4)
    )
    assert four.sent == once.sent and four.calls == once.calls
    # Of a gradient each device gets the share that it updates: parameters / 8, not all of them.
    assert once.sent["all-reduce"] < 0.05 * 4 * num_params(config)


def test_the_products_of_a_step_are_the_same_on_any_mesh():
    config = GPTConfig.modern(8, aspect_ratio=32, sequence_len=128, vocab_size=256)
    flops = {
        mesh: jaxpr_flops(
            traced_step(make_mesh(mesh), config, accumulation=2).jaxpr, config, platform="cpu"
        )
        for mesh in ("1x1", "8x1", "4x2")
    }
    # Muon pads its gates to whole devices
    assert flops["8x1"] == flops["4x2"] == pytest.approx(flops["1x1"], rel=0.01)


def test_what_memory_asks_for_is_chosen_and_what_is_given_is_kept():
    mesh, config = make_mesh("8x1"), GPTConfig.modern(20)
    chosen = functools.partial(choose_memory, config, mesh, remat="auto")
    assert chosen(rows=None, fsdp=None, limit=None) == (32, "none", False)
    assert chosen(rows=None, fsdp=None, limit=2**40) == (32, "none", False)
    assert chosen(rows=None, fsdp=None, limit=40 * 2**30) == (16, "minimal", True)
    rows, remat, fsdp = chosen(rows=None, fsdp=None, limit=12 * 2**30)
    assert fsdp and remat == "block" and rows >= 8
    gpus = SimpleNamespace(
        devices=np.array([SimpleNamespace(platform="gpu")] * 8), shape={"data": 8, "model": 1}
    )
    on_gpus = functools.partial(choose_memory, config, gpus, remat="auto", rows=None, fsdp=None)
    assert [on_gpus(limit=limit * 2**30) for limit in (72, 60, 30)] == [
        (32, "none", False),
        (16, "none", False),
        (16, "minimal", True),
    ]
    assert choose_memory(config, mesh, rows=4, remat="none", fsdp=False, limit=2**30) == (
        4,
        "none",
        False,
    )
    assert choose_memory(
        config, make_mesh("1x1"), rows="auto", remat="auto", fsdp=True, limit=2**40
    ) == ("auto", "none", False)


def test_the_largest_batch_is_the_last_that_fits():
    tried = []

    def attempt(rows):
        tried.append(rows)
        if rows > 4:
            raise DoesNotFit
        return type("Plan", (), {"memory": type("Memory", (), {"fits": True})})

    assert largest_batch(attempt, 64)[0] == 4 and tried == [1, 2, 4, 8]
    assert largest_batch(attempt, 2)[0] == 2
    with pytest.raises(UsageError, match="remat"):
        largest_batch(lambda rows: attempt(64), 64)


def test_a_step_takes_at_least_the_slowest_of_its_costs_and_one_at_a_time_the_sum_over_kernels():
    chip = CHIPS["h100"]
    kinds = ("products", "kernels", "element-wise", "copies", "collectives")
    traffic = {
        kind: seconds * chip.bandwidth for kind, seconds in zip(kinds, (3.0, 1.0, 2.0, 0.5, 0.25))
    }
    cost = HloCost(
        traffic=defaultdict(float, traffic), sent=Counter({"all-gather": 1.5 * chip.link})
    )

    def plan(products, low=0.0):
        return Plan(
            "h100",
            8,
            Memory(0, 0, 0, 0, 0),
            flops=products * PEAKS["h100"][0],
            low_flops=low * PEAKS["h100"][0],
            model_flops=3.0 * PEAKS["h100"][0],
            cost=cost,
            tokens=10,
            compile_seconds=0.0,
        )

    assert plan(5.0).step_seconds == pytest.approx(6.75) and plan(8.0).step_seconds == 8.0
    # Products take the time of their own traffic where that is longer; what is sent takes longer
    # than what it reads and writes.
    assert [plan(products).serial_seconds for products in (5.0, 1.0)] == pytest.approx(
        [5 + 2.5 + 1.5, 4 + 2.5 + 1.5]
    )
    assert plan(5.0).as_json()["one_at_a_time"]["mfu"] == pytest.approx(3 / 9)
    # Low-precision products take half of the time.
    assert plan(8.0, low=2.0).times["products"] == pytest.approx(6 + 2 / 2)


@pytest.mark.parametrize("name", ["v9:2x4", "v6e", "v6e-7", "h100:"])
def test_an_unknown_topology_is_refused_in_one_line(name):
    with pytest.raises(UsageError, match="topology") as refused:
        topology_devices(name)
    assert "\n" not in str(refused.value)


def test_estimated_cycles_count_each_round_of_a_loop_and_rank_the_kernels():
    """Hand-written: only the compiler for TPUs writes estimates."""
    text = """HloModule counted

inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%p, %p)
}

body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8]{0} get-tuple-element(%b), index=1
  %add_fusion.7 = f32[8]{0} fusion(%x), K, backend_config={"estimated_cycles":"100"}
  %add_fusion.8.clone = f32[8]{0} fusion(%add_fusion.7), K, backend_config={"estimated_cycles":"50"}
  ROOT %next = (s32[], f32[8]) tuple(%i, %add_fusion.8.clone)
}

cond (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%j, %ten), direction=LT
}

ENTRY %main (start: (s32[], f32[8])) -> f32[8] {
  %start = (s32[], f32[8]) parameter(0)
  %loop = (s32[], f32[8]) while(%start), condition=%cond, body=%body
  %y = f32[8]{0} get-tuple-element(%loop), index=1
  ROOT %copy.3 = f32[8]{0} copy(%y), backend_config={"estimated_cycles":"7"}
}
"""
    kind = 'kind=kLoop, calls=%inner, metadata={op_name="step/mlp/add"}'
    assert estimated_kernels(text.replace(" K,", f" {kind},")) == [
        Kernel("add_fusion", "f32[8]", "step/mlp/add", calls=20, cycles=1500),
        Kernel("copy", "f32[8]", "", calls=1, cycles=7),
    ]


def test_only_tpus_have_slices_and_these_divide_the_data_axis():
    with pytest.raises(UsageError, match="`slices=2`: only TPUs have slices"):
        topology_devices("h100:8", slices=2)
    devices = [SimpleNamespace(platform="tpu", slice_index=index // 2) for index in range(6)]
    with pytest.raises(UsageError, match="2-way data parallelism cannot be split over 3 slices"):
        make_mesh("2x3", devices)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed"
)


def plan(flags, **environment):
    command = [sys.executable, "-m", "tpu.plan", *flags.split()]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_libtpu
@pytest.mark.slow
def test_a_train_step_compiles_for_a_slice_of_several_hosts():
    found = plan(
        "--depth 2 --topology v5e-16 --vocab-size 4096 --device-batch-size 1 "
        "--total-batch-size 65536 --num-iterations 10"
    )
    config = GPTConfig.modern(2, vocab_size=4096)
    assert found["devices"] == 16 and found["memory"]["fits"] and found["loops_counted_once"] == 0
    assert found["estimated_cycles"] > 0
    shapes = abstract_params(config)
    tables = shapes["wte"].size + shapes["value_embeds"].size  # in bfloat16
    assert found["memory"]["parameters"] == 4 * num_params(config) - 2 * tables
    # What MFU counts is all of the window for every query; executed are the visible pairs, and
    # Muon.
    assert 0.5 < found["flops"] / found["model_flops"] < 1.2


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology, mfu", [("v5e-16", 0.6), ("v6e-8", 0.6)])
def test_d20_compiles_and_fits_with_the_default_settings(topology, mfu):
    found = plan(f"--depth 20 --topology {topology}")
    config = GPTConfig.modern(20)
    assert found["memory"]["fits"] and found["device_batch_size"] >= 8 and found["mfu_bound"] >= mfu
    # No logits of all positions: nothing is as large.
    elements = math.prod(map(int, re.search(r"\[(.*)\]", found["largest_array"])[1].split(",")))
    assert elements < found["device_batch_size"] * config.sequence_len * config.vocab_size
    # Parameters are gathered, state of the optimizer is not: it is larger than they are.
    gathered = found["collectives"]["all-gather"]["bytes_sent"]
    assert gathered < 1.5 * 4 * num_params(config) * (1 + found["fsdp"] * 2 * found["accumulation"])


@needs_libtpu
@pytest.mark.slow
def test_decoding_on_one_chip_moves_the_matrices_and_the_cache_and_little_else():
    found = plan("--depth 8 --topology v6e-1 --max-seq-len 512 --decode --slots 8")
    config = GPTConfig.modern(8, sequence_len=512)
    assert found["memory"]["parameters"] == 2 * num_params(config)
    assert found["memory"]["fits"] and not found["collectives"]
    matrices, cache = (
        2 * num_scaling_params(config),
        2 * 2 * config.n_layer * 8 * config.sequence_len * config.n_embd,
    )
    assert found["memory"]["optimizer"] == cache  # what is carried from step to step
    # no table of embeddings, and no cache in another layout
    assert found["hbm_bytes"] < 1.5 * (matrices + cache)


@needs_libtpu
@pytest.mark.slow
def test_slices_exchange_gradients_and_parameters_once_a_step():
    # Rows of 2,048 tokens on 8 chips: one micro-batch, then four.
    one, four = (
        plan(
            "--depth 2 --topology v5e:2x2 --slices 2 --vocab-size 4096 --device-batch-size 1 "
            f"--num-iterations 10 --total-batch-size {16384 * rounds}"
        )
        for rounds in (1, 4)
    )
    assert (one["devices"], one["mesh"], one["accumulation"], four["accumulation"]) == (
        8,
        "8x1",
        1,
        4,
    )
    # Each chip sends its quarter of the gradients, and what others need of the parameters.
    quarter = 4 * num_params(GPTConfig.modern(2, vocab_size=4096)) / 4
    for found in one, four:
        assert quarter / 2 < found["network"]["bytes_sent"] < 4 * quarter
    assert four["network"]["bytes_sent"] < 1.1 * one["network"]["bytes_sent"]


@needs_libtpu
@pytest.mark.slow
def test_d4_compiles_for_two_slices():
    found = plan("--depth 4 --topology v6e:4x4 --slices 2")
    assert found["devices"] == 32 and found["memory"]["fits"] and found["network"]["transfers"]


needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="XLA's compiler for GPUs is not installed",
)


@needs_cuda
@pytest.mark.slow
def test_the_estimated_memory_of_gpus_holds_what_a_plan_needs_and_little_more():
    found = plan("--depth 12 --topology h100:8")
    estimated = estimate_memory(
        GPTConfig.modern(12),
        found["device_batch_size"],
        data=8,
        remat=found["remat"],
        fsdp=found["fsdp"],
        gpu=True,
    )
    assert found["memory"]["fits"] and 0.85 * estimated < found["memory"]["total"] < estimated


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("attention", ["auto", "xla"])
def test_a_train_step_compiles_for_a_gpu_with_the_attention_that_runs_there(attention):
    found = plan(
        "--depth 2 --topology h100:1 --vocab-size 4096 --device-batch-size 1 --remat minimal "
        f"--total-batch-size 4096 --num-iterations 10 --attention {attention}"
    )
    assert found["memory"]["parameters"] == 4 * num_params(GPTConfig.modern(2, vocab_size=4096))
    assert found["loops_counted_once"] == 0 and 0.5 < found["flops"] / found["model_flops"] < 1.2
    # In each of two micro-batches and two layers the forward call is made once, not again for the
    # backward pass.
    calls = {"__cudnn$fmhaSoftmax": 4, "__cudnn$fmhaSoftmaxBackward": 4}
    called = {name: count for name, count in found["kernels"].items() if "cudnn" in name}
    assert called == (calls if attention == "auto" else {}) and ("cuDNN" in found["not_exact"]) == (
        attention == "auto"
    )


@needs_cuda
@pytest.mark.slow
def test_a_deterministic_step_adds_without_atomics(tmp_path):
    def atomics(name, *flags):
        # Without a GPU, XLA cannot choose kernels of Triton that it calls deterministic.
        writes = f"--xla_dump_to={tmp_path / name}", "--xla_dump_emitter_re=.*"
        plan(
            "--depth 2 --topology h100:1 --vocab-size 512 --max-seq-len 256 --device-batch-size 1 "
            "--total-batch-size 512 --num-iterations 10",
            XLA_FLAGS=" ".join(("--xla_gpu_enable_triton_gemm=false", *writes, *flags)),
        )
        programs = [path.read_text() for path in (tmp_path / name).glob("*.ptx")]
        assert programs
        return sum(len(re.findall(r"\b(?:atom|red)\.", text)) for text in programs)

    assert atomics("default") > 0
    assert atomics("deterministic", DETERMINISTIC) == 0


def test_cudnn_is_assumed_no_longer_than_asked_for():
    check = fused_attention_stablehlo.check_cudnn_version
    with pytest.raises(ZeroDivisionError), assumed_cudnn():
        assert fused_attention_stablehlo.check_cudnn_version() >= 90000
        raise ZeroDivisionError
    assert fused_attention_stablehlo.check_cudnn_version is check

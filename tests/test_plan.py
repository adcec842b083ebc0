"""Plans: what is counted is what programs do, and real steps compile for TPUs that are not there."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nanochat_jax.cli import UsageError
from nanochat_jax.config import GPTConfig
from nanochat_jax.plan import DoesNotFit, largest_batch, topology_devices
from nanochat_jax.plan_cost import hlo_cost, jaxpr_flops, parse_hlo, visible_pairs
from nanochat_jax.sharding import make_mesh

CONFIG = GPTConfig.modern(1, sequence_len=64, vocab_size=64)


@pytest.mark.parametrize("length, window", [(7, None), (7, 0), (7, 3), (7, 6), (7, 100)])
def test_visible_pairs_are_those_of_the_mask(length, window):
    distance = np.arange(length)[:, None] - np.arange(length)
    assert visible_pairs(length, window) == ((distance >= 0) & (distance <= (length if window is None else window))).sum()


def test_products_inside_loops_count_once_a_round():
    weight = jnp.ones((32, 16))

    def step(x):
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ weight) @ weight.T, None), x, length=5)[0].sum()

    forward = 5 * 2 * (2 * 8 * 32 * 16)
    x = jnp.ones((8, 32))
    assert jaxpr_flops(jax.make_jaxpr(step)(x), CONFIG, rows=8) == forward
    # Of the backward pass only the products with the cotangents: the weight is a constant.
    assert jaxpr_flops(jax.make_jaxpr(jax.grad(step))(x), CONFIG, rows=8) == 2 * forward
    remat = jaxpr_flops(jax.make_jaxpr(jax.grad(jax.checkpoint(step)))(x), CONFIG, rows=8)
    assert remat == 3 * forward


def compiled_text(f, *arguments):
    return jax.jit(f).lower(*arguments).compile().as_text()


def test_every_instruction_of_a_module_is_parsed():
    text = compiled_text(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.sort(y @ y), x), jnp.ones((16, 16)))
    computations, entry = parse_hlo(text)
    assert entry in computations
    assert sum(map(len, computations.values())) == sum(" = " in line and line.startswith("  ") for line in text.splitlines())


def test_traffic_grows_with_the_rounds_of_a_loop():
    def traffic(rounds):
        def body(x, _):
            return jnp.sort(x, axis=0), None  # nothing that could be fused with the next round

        return hlo_cost(compiled_text(lambda x: jax.lax.scan(body, x, length=rounds)[0], jnp.ones((64, 64)))).hbm_bytes

    one_round = (traffic(20) - traffic(10)) / 10
    assert one_round >= 2 * 64 * 64 * 4 and traffic(40) == pytest.approx(traffic(20) + 20 * one_round)


def test_collectives_count_what_a_device_sends():
    mesh = make_mesh("8x1")
    spread, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=spread)
    gather = hlo_cost(jax.jit(lambda x: x, out_shardings=whole).lower(x).compile().as_text())
    assert gather.calls == {"all-gather": 1} and gather.sent["all-gather"] == 64 * 128 * 4 * 7 / 8
    reduce = hlo_cost(jax.jit(lambda x: x.sum(axis=0), out_shardings=whole).lower(x).compile().as_text())
    assert reduce.calls == {"all-reduce": 1} and reduce.sent["all-reduce"] == 128 * 4 * 2 * 7 / 8


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


@pytest.mark.parametrize("name", ["v9:2x4", "v6e", "v6e-7", "h100:"])
def test_an_unknown_topology_is_refused_in_one_line(name):
    with pytest.raises(UsageError, match="topology") as refused:
        topology_devices(name)
    assert "\n" not in str(refused.value)


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_compiler_the_plan_says_how_to_get_it():
    with pytest.raises(UsageError, match="pip install libtpu"):
        topology_devices("v6e:2x4")


def plan(*flags):
    command = [sys.executable, "-m", "tpu.plan", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_libtpu
@pytest.mark.slow
def test_a_train_step_compiles_for_a_slice_of_several_hosts():
    found = plan("--depth", "2", "--topology", "v5e-16", "--vocab-size", "4096", "--device-batch-size", "1",
                 "--total-batch-size", "65536", "--num-iterations", "10")
    config = GPTConfig.modern(2, vocab_size=4096)
    assert found["devices"] == 16 and found["memory"]["fits"] and found["loops_counted_once"] == 0
    assert found["memory"]["parameters"] == 4 * config.num_params
    # What MFU counts is all of the window for every query; executed are the visible pairs, and Muon.
    assert 0.5 < found["flops"] / found["model_flops"] < 1.2


@needs_libtpu
@pytest.mark.slow
def test_decoding_compiles_for_one_chip():
    found = plan("--depth", "2", "--topology", "v5e-1", "--vocab-size", "4096", "--decode", "--slots", "4")
    config = GPTConfig.modern(2, vocab_size=4096)
    assert found["memory"]["parameters"] == 2 * config.num_params
    assert found["memory"]["fits"] and not found["collectives"]

"""Plan a training run on TPUs or GPUs that you do not have: what fits, how fast it can be, what it
costs.

    python -m tpu.plan --depth 20 --topology v6e:2x4
    python -m tpu.plan --depth 24 --topology v5e-16 --price 1.20
    python -m tpu.plan --depth 20 --topology h100:8
    python -m tpu.plan --depth 20 --topology v6e:1x1 --decode

Compiles the real train step ahead of time for the slice, or the engine's decode step with --decode.
Prints a table, then one line of JSON. Times are lower bounds from the roofline of the hardware; a
run is slower.
"""

import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from typing import Any, Literal

# This process only compiles. JAX reads the variable when it is imported.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from nanochat_jax import cli
from nanochat_jax.cli import count, flag, inherited
from nanochat_jax.infer import decode
from nanochat_jax.infer.decode import DecodeConfig, cache_sharding
from nanochat_jax.metrics import format_seconds
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.rows import Rows
from nanochat_jax.model.sharding import (
    abstract_tree,
    data_size,
    make_mesh,
    mesh_text,
    param_shardings,
    replicated,
)
from nanochat_jax.model.size import num_params, num_scaling_params
from nanochat_jax.model.weights import abstract_params
from nanochat_jax.train.memory import choose_memory
from nanochat_jax.train.optim import make_optimizer
from nanochat_jax.train.pretrain import BaseTrainConfig, model_config, optimizer_parts, recipe
from nanochat_jax.train.setup import table_dtype
from nanochat_jax.train.step import batch_shape, make_train_step, state_shardings
from tpu.compile import (
    CHIPS,
    GIB,
    DoesNotFit,
    Plan,
    Program,
    Target,
    compile_plan,
    largest_batch,
    topology_devices,
    train_plan,
)

log = logging.getLogger(__name__)
EXIT_DOES_NOT_FIT = 3


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    topology: str = flag("v6e:2x4", "CHIP:SHAPE, such as v6e:2x4, v5e-16, v5p:2x2x2 or h100:8")
    slices: int = count(1, "number of such TPU slices, connected by the network", at_most=1000)
    mesh: str = inherited(BaseTrainConfig, "mesh")
    depth: int = inherited(BaseTrainConfig, "depth")
    arch: str = inherited(BaseTrainConfig, "arch")
    max_seq_len: int = inherited(BaseTrainConfig, "max_seq_len")
    vocab_size: int = count(
        32768, "vocabulary size (upstream's classic models: 65536)", at_most=2**24
    )
    aspect_ratio: int = inherited(BaseTrainConfig, "aspect_ratio")
    head_dim: int = inherited(BaseTrainConfig, "head_dim")
    window_pattern: str = inherited(BaseTrainConfig, "window_pattern")
    attention: str = inherited(BaseTrainConfig, "attention")
    fsdp: bool | None = inherited(BaseTrainConfig, "fsdp")
    remat: str = inherited(BaseTrainConfig, "remat")
    precision: str = inherited(BaseTrainConfig, "precision")
    table_dtype: str = inherited(BaseTrainConfig, "table_dtype")
    fp8: bool = inherited(BaseTrainConfig, "fp8")
    fp8_recipe: str = inherited(BaseTrainConfig, "fp8_recipe")
    device_batch_size: int | Literal["auto"] | None = inherited(
        BaseTrainConfig, "device_batch_size"
    )
    total_batch_size: int = inherited(BaseTrainConfig, "total_batch_size")
    num_iterations: int = inherited(BaseTrainConfig, "num_iterations")
    target_param_data_ratio: float = inherited(BaseTrainConfig, "target_param_data_ratio")
    decode: bool = flag(False, "plan the engine's decoding instead of training")
    slots: int = count(8, "sequences decoded together (with --decode)", at_most=10**6)
    compiler_options: str | None = flag(
        None,
        "XLA options NAME=VALUE, separated by commas; a real run reads LIBTPU_INIT_ARGS instead",
    )
    kernels: int = count(
        0, "number of kernels to list, by the compiler's estimate (TPUs)", at_least=0, at_most=10**6
    )
    price: float = flag(0.0, "price of one device per hour (0: unknown)", at_least=0, at_most=10**9)

    def __post_init__(self) -> None:
        if not all("=" in option for option in self._options):
            raise ValueError(
                f"`compiler_options` {self.compiler_options!r} is not NAME=VALUE, "
                "separated by commas"
            )
        self.training()  # checks the flags that it shares

    @property
    def _options(self) -> list[str]:
        return [option for option in (self.compiler_options or "").split(",") if option]

    @property
    def options(self) -> dict[str, str | bool]:
        return {name: value for name, value in (option.split("=", 1) for option in self._options)}

    def training(self) -> BaseTrainConfig:
        """Return the shared flags as a config of pretraining."""
        shared = {field.name for field in dataclasses.fields(BaseTrainConfig)} & {
            field.name for field in dataclasses.fields(self)
        }
        return BaseTrainConfig(**{name: getattr(self, name) for name in shared})


def plan_training(config: PlanConfig, target: Target) -> tuple[Plan, dict[str, Any]]:
    """Return the plan of a train step and the settings that it was compiled with."""
    training, mesh = config.training(), target.mesh
    model, reference = model_config(training, config.vocab_size)
    run = recipe(training, model, reference)
    rates, schedules = optimizer_parts(training, run)
    most = run.total_batch_size // model.sequence_len // data_size(mesh)  # rows per device
    rows, remat, fsdp = choose_memory(
        model,
        mesh,
        rows=config.device_batch_size,
        remat=training.remat,
        fsdp=config.fsdp,
        step_rows=most,
        limit=CHIPS[target.chip].hbm,
    )
    compute = Compute.on(
        mesh,
        dtype=jnp.bfloat16,
        remat=remat,
        attention=config.attention,
        precision=training.step_precision,
    )
    optimizer = make_optimizer(model, rates, schedules, compute)
    tables = table_dtype(training, model, compute)
    state, shardings = state_shardings(model, optimizer, mesh, fsdp=fsdp, tables=tables)
    step = make_train_step(model, optimizer, compute, shardings)

    def attempt(rows: int) -> Plan:
        log.info("compiling a step of %d rows per device for %d x %s", rows, mesh.size, target.chip)
        shape = batch_shape(run.total_batch_size, rows, model.sequence_len, mesh)
        return train_plan(model, step, state, shardings, shape, target)

    if not isinstance(rows, int):
        rows, plan = largest_batch(attempt, most)
    else:
        plan = attempt(rows)
    shape = batch_shape(run.total_batch_size, rows, model.sequence_len, mesh)
    return plan, {
        "parameters": num_params(model),
        "num_iterations": run.num_iterations,
        "device_batch_size": shape.micro_rows // data_size(mesh),
        "accumulation": shape.accumulation,
        "remat": remat,
        "fsdp": fsdp,
        "precision": compute.precision,
        "tables": str(tables),
    }


def plan_decoding(config: PlanConfig, target: Target) -> Plan:
    """Return the plan of a decode step: one token for each of `slots` sequences."""
    mesh = target.mesh
    model, _ = model_config(config.training(), config.vocab_size)
    static = DecodeConfig(model, Compute.on(mesh, dtype=jnp.bfloat16), python_end=-1)
    params = decode_params(model, mesh)
    shape = (config.slots, model.n_kv_head, model.sequence_len, model.head_dim)
    layer: Any = jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=cache_sharding(*shape[:2], mesh)
    )
    slots = decode.Slots((layer,) * model.n_layer, (layer,) * model.n_layer)
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        decode.greedy_inputs(config.slots, length=0, steps=1),
    )
    attention = 2 * model.n_head * model.head_dim * model.n_layer * model.sequence_len
    flops = 2.0 * config.slots * (num_scaling_params(model) + attention)
    program = Program(
        jax.jit(lambda p, s, d: decode.decode(p, s, d, static=static), donate_argnums=1),
        (params, slots, inputs),
        parameters=params,
        state=slots,
        flops=flops,
        model_flops=flops,
        tokens=config.slots,
    )
    return compile_plan(program, target)


def decode_params(model: GPTConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Return abstract parameters in bfloat16, in the engine's form."""
    dtype = jnp.dtype(jnp.bfloat16)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_params(model)
    )
    params = abstract_tree(abstract, param_shardings(model, mesh))

    def layers(stack: jax.ShapeDtypeStruct) -> tuple[jax.ShapeDtypeStruct, ...]:
        sharding = NamedSharding(mesh, PartitionSpec(*stack.sharding.spec[1:]))
        return (jax.ShapeDtypeStruct(stack.shape[1:], dtype, sharding=sharding),) * stack.shape[0]

    head = params["lm_head"]
    rows = NamedSharding(mesh, PartitionSpec(*reversed((*head.sharding.spec, None, None)[:2])))
    values: Any = jax.ShapeDtypeStruct((model.vocab_size, model.n_embd), dtype, sharding=rows)
    return params | {
        "blocks": {name: layers(stack) for name, stack in params["blocks"].items()},
        **{name: layers(params[name]) for name in ("value_embeds",) if name in params},
        "lm_head": Rows(values, shape=(model.n_embd, model.vocab_size)),
    }


def table(plan: Plan, facts: dict[str, Any]) -> Table:
    """Return the plan as a table. `facts` describes the run and comes first."""
    memory = plan.memory
    shown = Table(show_header=False, box=None)
    for name, value in facts.items():
        shown.add_row(name.replace("_", " "), f"{value:,}" if type(value) is int else str(value))
    for name in ("parameters", "optimizer", "temporary", "total", "limit"):
        label = "cache" if name == "optimizer" and facts["program"] == "decode" else name
        shown.add_row(
            f"memory: {label}",
            f"{getattr(memory, name) / GIB:.2f} GiB"
            + (" (of a device)" if name == "limit" else ""),
        )
    shown.add_row("fits", "yes" if memory.fits else "NO")
    shown.add_row(
        "products",
        f"{plan.flops / 1e12:,.2f} TFLOP, {plan.times['products'] * 1e3:,.2f} ms at peak"
        + (f" (MFU counts {plan.model_flops / 1e12:,.2f})" if facts["program"] == "train" else ""),
    )
    if plan.low_flops:
        shown.add_row(
            "  in low precision",
            f"{plan.low_flops / 1e12:,.2f} TFLOP, {plan.cost.low_precision:,} calls",
        )
    shown.add_row(
        "memory traffic",
        f"{plan.cost.hbm_bytes / GIB:,.2f} GiB, {plan.times['memory'] * 1e3:,.2f} ms at peak",
    )
    for kind, moved in sorted(plan.cost.traffic.items(), key=lambda item: -item[1]):
        shown.add_row(f"  {kind}", f"{moved / GIB:,.2f} GiB")
    for name, calls in plan.cost.kernels.most_common():
        shown.add_row(f"  {name}", f"{calls:,} calls")
    for kind, sent in plan.cost.sent.most_common():
        shown.add_row(f"  {kind}", f"{plan.cost.calls[kind]:,} calls, {sent / GIB:,.3f} GiB sent")
    shown.add_row("links", f"{plan.times['links'] * 1e3:,.2f} ms at peak")
    if "network" in plan.times:
        shown.add_row(
            "between slices",
            f"{plan.cost.transfers:,} transfers, {plan.cost.network / GIB:,.3f} GiB sent, "
            f"{plan.times['network'] * 1e3:,.2f} ms at peak",
        )
    shown.add_row("largest array", plan.cost.largest[1])
    for name, seconds in (("roofline", plan.step_seconds), ("one at a time", plan.serial_seconds)):
        shown.add_row(
            name,
            f"{seconds * 1e3:,.2f} ms a step, MFU at most {100 * plan.mfu(seconds):.1f}%, "
            f"{plan.tokens / seconds:,.0f} tokens/s",
        )
    if plan.kernels:
        shown.add_row("compiler's estimate", f"{plan.estimated_cycles / 1e6:,.1f}M cycles a step")
    shown.add_row("compiled in", f"{plan.compile_seconds:.0f} s")
    return shown


def main(config: PlanConfig) -> int | None:
    chip, devices = topology_devices(config.topology, config.slices)
    mesh = make_mesh(config.mesh, devices)
    target = Target(chip, mesh, config.options)
    facts: dict[str, Any] = {
        "program": "decode" if config.decode else "train",
        "topology": config.topology,
        "slices": config.slices,
        "devices": mesh.size,
        "mesh": mesh_text(mesh),
        "depth": config.depth,
        "arch": config.arch,
    }
    try:
        if config.decode:
            plan = plan_decoding(config, target)
            facts["slots"] = config.slots
        else:
            plan, run = plan_training(config, target)
            facts |= run
            hours = plan.step_seconds * run["num_iterations"] / 3600
            facts["at_least"] = format_seconds(hours * 3600)
            if config.price:
                facts["cost_at_least"] = f"{hours * mesh.size * config.price:,.2f}"
    except DoesNotFit as error:
        print(f"does not fit: {error}")
        print(json.dumps(facts | {"memory": {"fits": False}}))
        return EXIT_DOES_NOT_FIT
    if chip == "h100":
        facts["exact"] = "collectives" if config.decode else "products, collectives"
        facts["not_exact"] = (
            "memory and traffic, as XLA chose kernels without measuring them; traffic is from below"
        )
        if any("cudnn" in name for name in plan.cost.kernels):
            facts["not_exact"] += "; cuDNN's workspace is not in the memory"
    Console().print(table(plan, facts))
    for kernel in plan.kernels[: config.kernels]:
        share = kernel.cycles / plan.estimated_cycles
        print(
            f"{kernel.cycles / 1e6:12,.2f}M cycles {share:6.1%} {kernel.calls:7,} x {kernel.kind} "
            f"{kernel.result} of {kernel.scope}"
        )
    print(json.dumps(facts | plan.as_json()))
    return None if plan.memory.fits else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    cli.run(main, PlanConfig, prog="tpu.plan", description=__doc__)

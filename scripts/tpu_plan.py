"""Plan a training run on TPUs or GPUs that you do not have: what fits, how fast it can be, what it
costs.

    python -m tpu.plan --depth 20 --topology v6e:2x4
    python -m tpu.plan --depth 24 --topology v5e-16 --price 1.20
    python -m tpu.plan --depth 20 --topology h100:8
    python -m tpu.plan --depth 20 --topology v6e:1x1 --decode

The real train step (or, with --decode, the engine's) is compiled ahead of time for the slice.
Prints a table, then one line of JSON. Times are the roofline's: what the hardware cannot beat, not
what a run will reach.
"""

import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from typing import Any, Literal

os.environ["JAX_PLATFORMS"] = "cpu"  # this process computes nothing; before JAX is imported

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from nanochat_jax import cli
from nanochat_jax.cli import flag, same_flag
from nanochat_jax.infer import decode
from nanochat_jax.infer.decode import DecodeConfig, cache_sharding
from nanochat_jax.metrics import format_seconds
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.sharding import (
    abstract_tree,
    data_size,
    make_mesh,
    param_shardings,
    replicated,
)
from nanochat_jax.model.size import num_params, num_scaling_params
from nanochat_jax.model.weights import abstract_params
from nanochat_jax.plan import (
    CHIPS,
    GIB,
    DoesNotFit,
    Plan,
    compile_plan,
    largest_batch,
    topology_devices,
    train_plan,
)
from nanochat_jax.train.memory import choose_memory
from nanochat_jax.train.optim import make_optimizer
from nanochat_jax.train.step import BatchShape, batch_shape, make_train_step, state_shardings
from scripts.base_train import BaseTrainConfig, model_config, optimizer_parts, recipe

log = logging.getLogger(__name__)
EXIT_DOES_NOT_FIT = 3


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    topology: str = flag("v6e:2x4", "CHIP:SHAPE, such as v6e:2x4, v5e-16, v5p:2x2x2 or h100:8")
    mesh: str = same_flag(BaseTrainConfig, "mesh")
    depth: int = same_flag(BaseTrainConfig, "depth")
    arch: str = same_flag(BaseTrainConfig, "arch")
    max_seq_len: int = same_flag(BaseTrainConfig, "max_seq_len")
    vocab_size: int = flag(
        32768, "size of the vocabulary (classic: 65536 is upstream's)", at_least=1, at_most=2**24
    )
    aspect_ratio: int = same_flag(BaseTrainConfig, "aspect_ratio")
    head_dim: int = same_flag(BaseTrainConfig, "head_dim")
    window_pattern: str = same_flag(BaseTrainConfig, "window_pattern")
    attention: str = same_flag(BaseTrainConfig, "attention")
    fsdp: bool | None = same_flag(BaseTrainConfig, "fsdp")
    remat: str = same_flag(BaseTrainConfig, "remat")
    device_batch_size: int | Literal["auto"] | None = same_flag(
        BaseTrainConfig, "device_batch_size"
    )
    total_batch_size: int = same_flag(BaseTrainConfig, "total_batch_size")
    num_iterations: int = same_flag(BaseTrainConfig, "num_iterations")
    target_param_data_ratio: float = same_flag(BaseTrainConfig, "target_param_data_ratio")
    decode: bool = flag(False, "plan the engine's decoding instead of training")
    slots: int = flag(
        8, "sequences that decode together (with --decode)", at_least=1, at_most=10**6
    )
    compiler_options: str | None = flag(
        None,
        "XLA options as NAME=VALUE, joined by commas; a real run takes them from LIBTPU_INIT_ARGS",
    )
    price: float = flag(
        0.0, "price of one device for an hour; 0: unknown", at_least=0, at_most=10**9
    )

    def __post_init__(self) -> None:
        if not all("=" in option for option in self._options):
            raise ValueError(
                f"--compiler-options {self.compiler_options!r} is not NAME=VALUE, joined by commas"
            )
        self.training()  # which checks what it takes

    @property
    def _options(self) -> list[str]:
        return [option for option in (self.compiler_options or "").split(",") if option]

    @property
    def options(self) -> dict[str, str | bool]:
        return {name: value for name, value in (option.split("=", 1) for option in self._options)}

    def training(self) -> BaseTrainConfig:
        """The same flags, as `scripts.base_train` takes them."""
        shared = {each.name for each in dataclasses.fields(BaseTrainConfig)} & {
            each.name for each in dataclasses.fields(self)
        }
        return BaseTrainConfig(**{name: getattr(self, name) for name in shared})


def plan_training(
    config: PlanConfig, chip: str, mesh: jax.sharding.Mesh
) -> tuple[Plan, BatchShape, dict[str, Any]]:
    training = config.training()
    model, reference = model_config(training, config.vocab_size)
    run = recipe(training, model, reference)
    rates, schedules = optimizer_parts(training, run)
    rows, remat, fsdp = choose_memory(
        model,
        mesh,
        rows=config.device_batch_size,
        remat=training.remat,
        fsdp=config.fsdp,
        step_rows=run.total_batch_size // model.sequence_len // data_size(mesh),
        limit=CHIPS[chip].hbm,
    )
    compute = Compute.on(mesh, dtype=jnp.bfloat16, remat=remat, attention=config.attention)
    optimizer = make_optimizer(model, rates, schedules, compute)
    state, shardings = state_shardings(model, optimizer, mesh, fsdp=fsdp)
    step = make_train_step(model, optimizer, compute, shardings)

    def attempt(rows: int) -> Plan:
        log.info("compiling a step of %d rows per device for %d x %s", rows, mesh.size, chip)
        shape = batch_shape(run.total_batch_size, rows, model.sequence_len, mesh)
        return train_plan(
            model, step, state, shardings, shape, chip=chip, mesh=mesh, options=config.options
        )

    if not isinstance(rows, int):
        most = run.total_batch_size // model.sequence_len // data_size(mesh)
        rows, plan = largest_batch(attempt, most)
    else:
        plan = attempt(rows)
    shape = batch_shape(run.total_batch_size, rows, model.sequence_len, mesh)
    return (
        plan,
        shape,
        {
            "parameters": num_params(model),
            "num_iterations": run.num_iterations,
            "device_batch_size": shape.micro_rows // data_size(mesh),
            "accumulation": shape.accumulation,
            "remat": remat,
            "fsdp": fsdp,
        },
    )


def plan_decoding(config: PlanConfig, chip: str, mesh: jax.sharding.Mesh) -> Plan:
    """One token for each of `slots` sequences, over a cache of `max_seq_len`."""
    model, _ = model_config(config.training(), config.vocab_size)
    dtype = jnp.dtype(jnp.bfloat16)
    static = DecodeConfig(model, Compute.on(mesh, dtype=dtype), shortest=1, pause=-1)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_params(model)
    )
    placed = abstract_tree(abstract, param_shardings(model, mesh))

    def layers(stack: jax.ShapeDtypeStruct) -> tuple[jax.ShapeDtypeStruct, ...]:
        sharding = NamedSharding(mesh, PartitionSpec(*stack.sharding.spec[1:]))
        return (jax.ShapeDtypeStruct(stack.shape[1:], dtype, sharding=sharding),) * stack.shape[0]

    head = placed.pop("lm_head")
    rows = NamedSharding(mesh, PartitionSpec(*reversed((*head.sharding.spec, None, None)[:2])))
    params = placed | {
        "blocks": {name: layers(stack) for name, stack in placed["blocks"].items()},
        **{name: layers(placed[name]) for name in ("value_embeds",) if name in placed},
        "lm_head_rows": jax.ShapeDtypeStruct(
            (model.vocab_size, model.n_embd), dtype, sharding=rows
        ),
    }
    shape = (config.slots, model.n_kv_head, model.sequence_len, model.head_dim)
    layer: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=cache_sharding(*shape[:2], mesh))
    slots = decode.Slots((layer,) * model.n_layer, (layer,) * model.n_layer)
    dispatch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        decode.greedy_inputs(config.slots, length=0, steps=1),
    )
    flops = (
        2.0
        * config.slots
        * (
            num_scaling_params(model)
            + 2 * model.n_head * model.head_dim * model.n_layer * model.sequence_len
        )
    )
    step = jax.jit(lambda p, s, d: decode.decode(p, s, d, static=static), donate_argnums=1)
    return compile_plan(
        step,
        (params, slots, dispatch),
        chip=chip,
        mesh=mesh,
        parameters=params,
        state=slots,
        flops=flops,
        model_flops=flops,
        tokens=config.slots,
        options=config.options,
    )


def table(plan: Plan, facts: dict[str, Any]) -> Table:
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
    shown.add_row(
        "memory traffic",
        f"{plan.cost.hbm_bytes / GIB:,.2f} GiB, {plan.times['memory'] * 1e3:,.2f} ms at peak",
    )
    for kind, moved in sorted(plan.cost.traffic.items(), key=lambda each: -each[1]):
        shown.add_row(f"  {kind}", f"{moved / GIB:,.2f} GiB")
    for name, calls in plan.cost.kernels.most_common():
        shown.add_row(f"  {name}", f"{calls:,} calls")
    for kind, sent in plan.cost.sent.most_common():
        shown.add_row(f"  {kind}", f"{plan.cost.calls[kind]:,} calls, {sent / GIB:,.3f} GiB sent")
    shown.add_row("links", f"{plan.times['links'] * 1e3:,.2f} ms at peak")
    shown.add_row("largest array", plan.cost.largest[1])
    for name, seconds in (("roofline", plan.step_seconds), ("one at a time", plan.serial_seconds)):
        shown.add_row(
            name,
            f"{seconds * 1e3:,.2f} ms a step, MFU at most {100 * plan.mfu(seconds):.1f}%, "
            f"{plan.tokens / seconds:,.0f} tokens/s",
        )
    shown.add_row("compiled in", f"{plan.compile_seconds:.0f} s")
    return shown


def main(config: PlanConfig) -> int | None:
    chip, devices = topology_devices(config.topology)
    mesh = make_mesh(config.mesh, devices)
    facts: dict[str, Any] = {
        "program": "decode" if config.decode else "train",
        "topology": config.topology,
        "devices": mesh.size,
        "mesh": "x".join(map(str, mesh.shape.values())),
        "depth": config.depth,
        "arch": config.arch,
    }
    try:
        if config.decode:
            plan = plan_decoding(config, chip, mesh)
            facts["slots"] = config.slots
        else:
            plan, _, run = plan_training(config, chip, mesh)
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
    print(json.dumps(facts | plan.as_json()))
    return None if plan.memory.fits else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    cli.run(main, PlanConfig, prog="scripts.tpu_plan", description=__doc__)

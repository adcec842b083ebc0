"""From nothing to a chat model: data, tokenizer, pretraining, midtraining, finetuning, evaluation, report.

    python -m scripts.speedrun                          without an accelerator: a small model of a corpus that needs no network
    python -m scripts.speedrun --with-rl                the same, and reinforcement learning after it
    python -m scripts.speedrun --mesh 8x1               on 8xH100: the d20 model on FineWeb-Edu or ClimbMix
    python -m scripts.speedrun --dry-run                what would run, and what it would cost
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanochat_jax import cli
from nanochat_jax.cli import UsageError, flag
from nanochat_jax.config import GPTConfig, Recipe, derive_recipe
from nanochat_jax.data.needs import TOKENIZER_SHARDS, explain_shards, shards_needed
from nanochat_jax.paths import CHECKPOINT_DIRS, DATA_DIRS, Paths
from nanochat_jax.speedrun import (
    Machine,
    Record,
    Stage,
    as_flags,
    memory_estimate,
    print_plan,
    run_stages,
    training_note,
)

# The model a CPU with two cores trains in a quarter of an hour, and how.
CPU_DEPTH = 4
CPU_VOCAB = 2048
CPU_BASE = dict(head_dim=64, max_seq_len=256, window_pattern="L", packing="stream", total_batch_size=4096, num_iterations=210,
                lr_scale=0.5, weight_decay=0.1, warmup_steps=10, eval_every=70, eval_tokens=65536)
CPU_MID = dict(total_batch_size=4096, num_iterations=250, init_lr_frac=0.5, warmdown_ratio=0.5, eval_every=80, eval_tokens=16384)
CPU_SFT = dict(total_batch_size=4096, num_iterations=60, init_lr_frac=0.3, eval_every=30, eval_tokens=16384)
CPU_RL = dict(task="WordArithmetic", num_iterations=36, examples_per_step=32, num_samples=16, device_batch_size=16,
              num_slots=128, max_new_tokens=40, init_lr_frac=0.03, eval_every=12, eval_examples=128, save_every=12)
CPU_DEVICE_BATCH = 16

STAGES = ("data", "data_rest", "tok_train", "tok_eval", "base_train", "base_loss", "base_eval", "mid_train", "chat_eval_mid",
          "chat_sft", "chat_eval_sft", "chat_rl", "chat_eval_rl", "report")


@dataclass(frozen=True, kw_only=True)
class SpeedrunConfig:
    mesh: str = flag("auto", "devices as DxM: D-way data and M-way tensor parallelism")
    depth: int | None = flag(None, f"number of layers, the dial; default 20, {CPU_DEPTH} on a CPU", short="-d")
    data: str | None = flag(None, "corpus; default: the one on disk, else climbmix; on a CPU embedded, which needs no network", choices=[*DATA_DIRS])
    run: str | None = flag(None, "wandb run name; dummy turns wandb off; default $WANDB_RUN, else dummy")
    resume: bool = flag(False, "go on with the last run and skip what it finished (the default)")
    fresh: bool = flag(False, "begin a new run: every stage runs again and replaces what it made before")
    skip: str = flag("", "stages to leave out, joined by commas; data: train on the shards that are there")
    with_rl: bool = flag(False, "reinforcement learning after SFT, and its evaluation")
    smoke: bool = flag(False, "a few steps per stage, to try an installation; the model learns nothing")
    dry_run: bool = flag(False, "print the plan and stop")

    def __post_init__(self) -> None:
        if self.resume and self.fresh:
            raise ValueError("--resume goes on with the last run, --fresh begins a new one: give one of them")
        unknown = [name for name in self.skipped if name not in STAGES]
        if unknown:
            raise ValueError(f"--skip {','.join(unknown)}: no such stage; there are {', '.join(STAGES)}")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"--depth must be at least 1, got {self.depth}")

    @property
    def skipped(self) -> list[str]:
        names = [name for name in self.skip.split(",") if name]
        return names + ["data_rest"] if "data" in names else names


def plan_stages(config: SpeedrunConfig, machine: Machine, wandb_run: str, on_disk: Mapping[str, int]
                ) -> tuple[list[Stage], str]:
    """The stages of this run, in order, and a title. `on_disk`: training shards that are there, by corpus."""
    cpu = machine.platform == "cpu"
    depth = config.depth or (CPU_DEPTH if cpu else 20)
    data = config.data or ("embedded" if cpu else next((name for name in DATA_DIRS if on_disk.get(name)), "climbmix"))
    small = data == "embedded"  # too small a corpus for the dial: it has a preset of its own
    vocab = CPU_VOCAB if small else 32768
    base: dict[str, Any] = CPU_BASE.copy() if small else {}
    mid: dict[str, Any] = CPU_MID.copy() if small else {}
    sft: dict[str, Any] = CPU_SFT.copy() if small else {}
    rl: dict[str, Any] = CPU_RL.copy() if small else {}
    device_batch = CPU_DEVICE_BATCH if small else (32 if depth < 20 else 16 if depth < 28 else 8)
    problems: dict[str, Any] = dict(max_new_tokens=64) if small else {}
    if config.smoke:
        base |= dict(num_iterations=4, eval_tokens=8192)
        mid |= dict(num_iterations=4, eval_tokens=8192)
        sft |= dict(num_iterations=4, eval_tokens=8192)
        rl |= dict(num_iterations=2, examples_per_step=2, max_new_tokens=8, eval_every=-1, eval_examples=4)
        problems = dict(max_problems=8, max_new_tokens=16)

    shape = dict(sequence_len=base.get("max_seq_len", 2048), vocab_size=vocab, head_dim=base.get("head_dim", 128),
                 window_pattern=base.get("window_pattern", "SSSL"))
    model, reference = GPTConfig.modern(depth, **shape), GPTConfig.modern(12, **shape)
    recipe = derive_recipe(model, reference=reference, total_batch_size=base.get("total_batch_size", -1),
                           num_iterations=base.get("num_iterations", -1))
    ways = _data_ways(config.mesh, machine)
    memory = memory_estimate(model, min(device_batch, -(-recipe.total_batch_size // model.sequence_len // ways)), ways)

    def seconds(tokens: float) -> float:
        return tokens * model.flops_per_token / machine.training_flops

    def training(name: str, module: str, source: str, own: dict[str, Any], tokens: int, steps: int, **flags: Any) -> Stage:
        rows = device_batch if name != "chat_sft" or small else min(device_batch, 4)
        return Stage(name=name, module=module, args=as_flags(**flags, model_tag=tag, **own),
                     placement=as_flags(mesh=config.mesh, device_batch_size=rows, save_every=save_every, run=wandb_run),
                     produces=True, checkpoints=f"{CHECKPOINT_DIRS[source]}/{tag}", seconds=seconds(tokens),
                     waits_for="data_rest" if name == "base_train" else "",
                     note=training_note(model, tokens, steps, memory))

    tag = f"d{depth}"
    save_every = 100 if small else 1000
    chosen = as_flags(model_tag=tag)
    placed = as_flags(mesh=config.mesh)
    tokens_of = lambda own, default: own["num_iterations"] * own["total_batch_size"] if own else default  # noqa: E731
    if data == "embedded":
        fetch = [Stage(name="data", module="nanochat_jax.dataset", args=("embedded",), produces=True,
                       note="12 MB of speeches from an installed package", seconds=10)]
    else:
        fetch = _fetch_stages(data, recipe, on_disk.get(data, 0))
    mid_tokens, sft_tokens = tokens_of(mid, 400_000_000), tokens_of(sft, 12_000_000)
    stages = [
        *fetch,
        Stage(name="tok_train", module="scripts.tok_train", args=as_flags(data=data, vocab_size=vocab), produces=True,
              note=f"vocabulary of {vocab:,}", seconds=5 if small else 100),
        Stage(name="tok_eval", module="scripts.tok_eval", args=as_flags(data=data), seconds=5),
        training("base_train", "scripts.base_train", "base", base, recipe.total_tokens, recipe.num_iterations, data=data,
                 depth=depth),
        Stage(name="base_loss", module="scripts.base_loss", placement=placed + as_flags(device_batch_size=device_batch),
              args=chosen + (as_flags(split_tokens=2 * base["eval_tokens"]) if small else ()), seconds=20),
        Stage(name="base_eval", module="scripts.base_eval", args=chosen + _core_limit(config), placement=placed, seconds=20),
        training("mid_train", "scripts.mid_train", "mid", mid, mid_tokens, mid.get("num_iterations", 0)),
        Stage(name="chat_eval_mid", module="scripts.chat_eval", args=("-i", "mid", *chosen, *as_flags(**problems)),
              placement=placed, seconds=30),
        training("chat_sft", "scripts.chat_sft", "sft", sft, sft_tokens, sft.get("num_iterations", 0)),
        Stage(name="chat_eval_sft", module="scripts.chat_eval", args=("-i", "sft", *chosen, *as_flags(**problems)),
              placement=placed, seconds=30),
        Stage(name="report", module="nanochat_jax.report", args=("generate",), seconds=3),
    ]
    if config.with_rl:
        stages[-1:-1] = [
            Stage(name="chat_rl", module="scripts.chat_rl", args=chosen + as_flags(**rl), produces=True,
                  checkpoints=f"{CHECKPOINT_DIRS['rl']}/{tag}",
                  placement=placed + as_flags(run=wandb_run), seconds=300 if small else 3600,
                  note="word problems, answered through the calculator" if small else "GSM8K"),
            Stage(name="chat_eval_rl", module="scripts.chat_eval", args=("-i", "rl", *chosen, *as_flags(**problems)),
                  placement=placed, seconds=30),
        ]
    reason = " (no accelerator found: the preset for a CPU, which needs no network)" if cpu and not config.data else ""
    title = f"speedrun: d{depth} on {data}{reason}"
    return [stage for stage in stages if stage.name not in config.skipped], title


def _fetch_stages(data: str, recipe: Recipe, have: int) -> list[Stage]:
    """The shards for the tokenizer first, then the rest in the background, while the tokenizer trains."""
    if data == "custom":  # made by hand: nothing to fetch
        if not have:
            raise UsageError("there is no corpus of your own yet: make one with `python -m nanochat_jax.dataset hf` or "
                             "`python -m nanochat_jax.dataset local`")
        return []
    needed = shards_needed(recipe)
    first = min(needed, TOKENIZER_SHARDS)
    explained = f"{explain_shards(recipe, needed)}; {min(have, needed)} are there"
    stages = [Stage(name="data", module="nanochat_jax.dataset", args=as_flags(dataset=data) + ("-n", str(first)),
                    produces=True, note=f"the first {first} of {explained}")]
    if needed > first:
        stages.append(Stage(name="data_rest", module="nanochat_jax.dataset", background=True, note=f"{needed} shards in all",
                            args=as_flags(dataset=data) + ("-n", str(needed))))
    return stages


def _core_limit(config: SpeedrunConfig) -> tuple[str, ...]:
    return as_flags(max_per_task=8) if config.smoke else ()


def _data_ways(mesh: str, machine: Machine) -> int:
    if mesh == "auto":
        return machine.count
    data, _, model = mesh.partition("x")
    if not (data.isdigit() and model.isdigit() and int(data) and int(model)):
        raise UsageError(f"--mesh {mesh!r} is not of the form DxM, such as 8x1 (or auto)")
    if int(data) * int(model) > machine.count:
        hint = ""
        if machine.platform == "cpu":
            hint = (" (to try a mesh on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count="
                    f"{int(data) * int(model)})")
        raise UsageError(f"--mesh {mesh} needs {int(data) * int(model)} devices, this machine has {machine.count}{hint}")
    return int(data)


def main(config: SpeedrunConfig) -> int:
    paths = Paths.from_env()
    if paths.bucket:
        raise UsageError("speedrun keeps its record and its checkpoints on one machine: unset NANOCHAT_CHECKPOINT_DIR, or run the "
                         "stages one by one")
    machine = Machine.probe()
    wandb_run = config.run or os.environ.get("WANDB_RUN") or "dummy"
    on_disk = {name: max(0, len(list(paths.data(name).glob("*.parquet"))) - 1) for name in DATA_DIRS}
    stages, title = plan_stages(config, machine, wandb_run, on_disk)
    if config.dry_run:
        print_plan(stages, machine, title)
        return 0
    print(title, file=sys.stderr)
    return run_stages(stages, Record.open(paths, fresh=config.fresh))


if __name__ == "__main__":
    cli.run(main, SpeedrunConfig, prog="scripts.speedrun", description=__doc__.splitlines()[0])

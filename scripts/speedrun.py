"""Train a chat model from nothing: data, tokenizer, all training stages, evaluation, report.

python -m scripts.speedrun                  no accelerator: a small model, no network needed
python -m scripts.speedrun --with-rl        the same, then reinforcement learning
python -m scripts.speedrun --mesh 8x1       on 8xH100: the d20 model on FineWeb-Edu or ClimbMix
python -m scripts.speedrun --dry-run        print the commands and estimated times
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat_jax import cli
from nanochat_jax.cli import flag, run_name
from nanochat_jax.data.needs import TOKENIZER_SHARDS, explain_shards, shards_needed
from nanochat_jax.devices import DeviceFlags
from nanochat_jax.errors import UsageError
from nanochat_jax.files import lock_file, make_directory
from nanochat_jax.metrics import format_count
from nanochat_jax.model.compute import REMAT
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.recipe import Recipe, derive_recipe
from nanochat_jax.model.sharding import mesh_shape
from nanochat_jax.model.size import flops_per_token, num_params
from nanochat_jax.paths import CHECKPOINT_DIRS, DATA_DIRS, Paths
from nanochat_jax.pipeline import Machine, Record, Stage, as_flags, print_plan, run_stages
from nanochat_jax.train.memory import estimate_memory

# Settings of the model that two idle cores train in 6 minutes, evaluations included.
CPU_DEPTH = 4
CPU_VOCAB = 2048
CPU_BASE = dict(
    head_dim=64,
    max_seq_len=256,
    window_pattern="L",
    packing="stream",
    total_batch_size=4096,
    num_iterations=210,
    lr_scale=0.5,
    weight_decay=0.1,
    warmup_steps=10,
    eval_every=70,
    eval_tokens=65536,
)
CPU_MID = dict(
    total_batch_size=4096,
    num_iterations=250,
    init_lr_frac=0.5,
    warmdown_ratio=0.5,
    eval_every=80,
    eval_tokens=16384,
)
CPU_SFT = dict(
    total_batch_size=4096, num_iterations=60, init_lr_frac=0.3, eval_every=30, eval_tokens=16384
)
CPU_RL = dict(
    task="WordArithmetic|Spelling",
    num_iterations=36,
    examples_per_step=32,
    num_samples=16,
    device_batch_size=16,
    num_slots=128,
    max_new_tokens=40,
    init_lr_frac=0.06,
    eval_every=12,
    eval_examples=128,
    save_every=12,
)
CPU_DEVICE_BATCH = 16

# Sizes of the mixtures (tasks/mixtures.py), for estimates. The stage counts its own steps.
MID_CONVERSATIONS, MID_TOKENS = 848_000, 400e6
SFT_CONVERSATIONS, SFT_TOKENS, SFT_ROWS, SFT_DEVICE_BATCH = 22_400, 12e6, 32, 4

STAGES = (
    "data",
    "data_rest",
    "tok_train",
    "tok_eval",
    "base_train",
    "base_loss",
    "base_eval",
    "mid_train",
    "chat_eval_mid",
    "chat_sft",
    "chat_eval_sft",
    "chat_rl",
    "chat_eval_rl",
    "report",
)


@dataclass(frozen=True, kw_only=True)
class SpeedrunConfig(DeviceFlags):
    mesh: str = flag("auto", "devices as DxM: D-way data and M-way tensor parallelism")
    depth: int | None = flag(
        None,
        f"number of layers, the dial; default 20, {CPU_DEPTH} on a CPU",
        short="-d",
        at_least=1,
        at_most=1000,
    )
    data: str | None = flag(
        None,
        "corpus; default: the one on disk, else climbmix; on a CPU embedded, which needs no "
        "network",
        choices=[*DATA_DIRS],
    )
    device_batch_size: int | Literal["auto"] | None = flag(
        None,
        "rows per device and micro-step of base, mid and SFT; auto: the most that fit; default by "
        "the device's memory",
        at_least=1,
        at_most=10**6,
    )
    remat: str | None = flag(
        None,
        "activations that the backward pass recomputes, to save memory",
        choices=[*REMAT, "elementwise"],
    )
    fsdp: bool = flag(False, "shard the parameters over the data axis too, to save memory")
    run: str | None = flag(
        None,
        "wandb run name; dummy turns wandb off; default $WANDB_RUN, else dummy",
        check=run_name,
    )
    resume: bool = flag(False, "go on with the last run and skip what it finished (the default)")
    fresh: bool = flag(
        False, "begin a new run: every stage runs again and replaces what it made before"
    )
    skip: str | None = flag(
        None, "stages to leave out, joined by commas; data: train on the shards that are there"
    )
    with_rl: bool = flag(False, "reinforcement learning after SFT, and its evaluation")
    smoke: bool = flag(
        False, "a few steps per stage, to try an installation; the model learns nothing"
    )
    dry_run: bool = flag(False, "print the plan and stop")

    def __post_init__(self) -> None:
        if self.remat == "elementwise":  # the old name of "minimal"
            object.__setattr__(self, "remat", "minimal")
        if self.resume and self.fresh:
            raise ValueError(
                "--resume goes on with the last run, --fresh begins a new one: give one of them"
            )
        unknown = [name for name in self.skipped if name not in STAGES]
        if unknown:
            raise ValueError(
                f"--skip {','.join(unknown)}: no such stage; there are {', '.join(STAGES)}"
            )

    @property
    def skipped(self) -> list[str]:
        names = [name for name in (self.skip or "").split(",") if name]
        return names + ["data_rest"] if "data" in names else names


def plan_stages(
    config: SpeedrunConfig, machine: Machine, wandb_run: str, on_disk: Mapping[str, int]
) -> tuple[list[Stage], str]:
    """(the stages of this run in order, a title).

    `on_disk`: number of training shards on disk, by corpus.
    """
    cpu = machine.platform == "cpu"
    depth = config.depth or (CPU_DEPTH if cpu else 20)
    data = config.data or (
        "embedded" if cpu else next((name for name in DATA_DIRS if on_disk.get(name)), "climbmix")
    )
    small = data == "embedded"  # too small for the scaling laws: it has a preset
    vocab = CPU_VOCAB if small else 32768
    base: dict[str, Any] = CPU_BASE.copy() if small else {}
    mid: dict[str, Any] = CPU_MID.copy() if small else {}
    sft: dict[str, Any] = CPU_SFT.copy() if small else {}
    rl: dict[str, Any] = CPU_RL.copy() if small else {}
    fitting = CPU_DEVICE_BATCH if small else (32 if depth < 20 else 16 if depth < 28 else 8)
    device_batch = config.device_batch_size or fitting
    if device_batch != "auto":
        fitting = device_batch
    problems: dict[str, Any] = dict(max_new_tokens=64) if small else {}
    if config.smoke:
        base |= dict(num_iterations=4, eval_tokens=8192)
        mid |= dict(num_iterations=4, eval_tokens=8192)
        sft |= dict(num_iterations=4, eval_tokens=8192)
        rl |= dict(
            num_iterations=2, examples_per_step=2, max_new_tokens=8, eval_every=-1, eval_examples=4
        )
        problems = dict(max_problems=8, max_new_tokens=16)

    shape = dict(
        sequence_len=base.get("max_seq_len", 2048),
        vocab_size=vocab,
        head_dim=base.get("head_dim", 128),
        window_pattern=base.get("window_pattern", "SSSL"),
    )
    model, reference = GPTConfig.modern(depth, **shape), GPTConfig.modern(12, **shape)
    recipe = derive_recipe(
        model,
        reference=reference,
        total_batch_size=base.get("total_batch_size", -1),
        num_iterations=base.get("num_iterations", -1),
    )
    ways, _ = mesh_shape(config.mesh, machine.count, machine.platform)
    remat = config.remat or "none"
    recomputing = 4 / 3 if remat in ("block", "full") else 1.0

    def seconds(tokens: float) -> float:
        return tokens * flops_per_token(model) * recomputing / machine.training_flops

    def training(
        name: str,
        source: str,
        own: dict[str, Any],
        tokens: float,
        step_tokens: int,
        length: str,
        *,
        most_rows: int = 1 << 30,
        **flags: Any,
    ) -> Stage:
        rows: int | str | None = device_batch
        memory = "as many rows per device as fit"
        if config.device_batch_size is None and not cpu:
            rows, memory = None, "rows per device by its memory"  # the stage decides
        elif isinstance(device_batch, int):
            rows = most = min(device_batch, most_rows)
            step_rows = -(-step_tokens // model.sequence_len // ways)  # per device
            needed = estimate_memory(
                model,
                min(most, step_rows),
                data=ways,
                remat=remat,
                fsdp=config.fsdp,
                gpu=machine.platform == "gpu",
            )
            # the stage decides: it can measure the device's memory
            chosen_later = not cpu and not (config.remat and config.fsdp)
            memory = (
                f"{'at most ' if chosen_later else ''}about {needed / 2**30:.1f} GiB per device"
            )
        return Stage(
            name=name,
            module=f"scripts.{name}",
            args=as_flags(**flags, model_tag=tag, **own),
            placement=placed
            + as_flags(device_batch_size=rows, **saving, save_every=save_every, run=wandb_run),
            produces=True,
            checkpoints=f"{CHECKPOINT_DIRS[source]}/{tag}",
            seconds=seconds(tokens),
            waits_for="data_rest" if name == "base_train" else "",
            note=f"{num_params(model) / 1e6:.1f}M parameters, {length}, {memory}",
        )

    def finetuning(
        name: str,
        source: str,
        own: dict[str, Any],
        conversations: int,
        tokens: float,
        step_tokens: int,
        most_rows: int = 1 << 30,
    ) -> Stage:
        if steps := own.get("num_iterations"):
            step_tokens = own.get("total_batch_size", step_tokens)
            tokens = steps * step_tokens
            length = f"{format_count(tokens)} tokens in {steps:,} steps"
        else:
            length = (
                f"one pass over {conversations:,} conversations, about {tokens / 1e6:,.0f}M "
                "tokens in "
                f"{tokens / step_tokens:,.0f} steps"
            )
        return training(name, source, own, tokens, step_tokens, length, most_rows=most_rows)

    tag = f"d{depth}"
    save_every = 100 if small else 1000
    chosen = as_flags(model_tag=tag)
    placed = as_flags(mesh=config.mesh)
    saving: dict[str, Any] = dict(remat=config.remat, fsdp=config.fsdp)
    if data == "embedded":
        fetch = [
            Stage(
                name="data",
                module="nanochat_jax.dataset",
                args=("embedded",),
                produces=True,
                note="12 MB of speeches from an installed package",
                seconds=10,
            )
        ]
    else:
        fetch = _fetch_stages(data, recipe, on_disk.get(data, 0))
    stages = [
        *fetch,
        Stage(
            name="tok_train",
            module="scripts.tok_train",
            args=as_flags(data=data, vocab_size=vocab),
            produces=True,
            note=f"vocabulary of {vocab:,}",
            seconds=5 if small else 100,
        ),
        Stage(name="tok_eval", module="scripts.tok_eval", args=as_flags(data=data), seconds=5),
        training(
            "base_train",
            "base",
            base,
            recipe.total_tokens,
            recipe.total_batch_size,
            f"{format_count(recipe.total_tokens)} tokens in {recipe.num_iterations:,} steps",
            data=data,
            depth=depth,
        ),
        Stage(
            name="base_loss",
            module="scripts.base_loss",
            placement=placed + as_flags(device_batch_size=fitting),
            args=chosen + (as_flags(split_tokens=2 * base["eval_tokens"]) if small else ()),
            seconds=20 if small else 0,
        ),
        Stage(
            name="base_eval",
            module="scripts.base_eval",
            placement=placed,
            seconds=20 if small else 0,
            args=chosen + as_flags(max_per_task=8 if config.smoke else None),
        ),
        finetuning("mid_train", "mid", mid, MID_CONVERSATIONS, MID_TOKENS, recipe.total_batch_size),
        Stage(
            name="chat_eval_mid",
            module="scripts.chat_eval",
            args=("-i", "mid", *chosen, *as_flags(**problems)),
            placement=placed,
            seconds=30 if small else 0,
        ),
        finetuning(
            "chat_sft",
            "sft",
            sft,
            SFT_CONVERSATIONS,
            SFT_TOKENS,
            SFT_ROWS * model.sequence_len,
            most_rows=CPU_DEVICE_BATCH if small else SFT_DEVICE_BATCH,
        ),
        Stage(
            name="chat_eval_sft",
            module="scripts.chat_eval",
            args=("-i", "sft", *chosen, *as_flags(**problems)),
            placement=placed,
            seconds=30 if small else 0,
        ),
        Stage(name="report", module="nanochat_jax.report", args=("generate",), seconds=3),
    ]
    if config.with_rl:
        stages[-1:-1] = [
            Stage(
                name="chat_rl",
                module="scripts.chat_rl",
                args=chosen + as_flags(**rl),
                produces=True,
                checkpoints=f"{CHECKPOINT_DIRS['rl']}/{tag}",
                placement=placed + as_flags(**saving, run=wandb_run),
                seconds=300 if small else 0,
                note="word problems, answered through the calculator, and spelling"
                if small
                else "GSM8K",
            ),
            Stage(
                name="chat_eval_rl",
                module="scripts.chat_eval",
                args=("-i", "rl", *chosen, *as_flags(**problems)),
                placement=placed,
                seconds=30 if small else 0,
            ),
        ]
    title = f"speedrun: d{depth} on {data}" + (
        _why_embedded(on_disk) if cpu and not config.data else ""
    )
    return [stage for stage in stages if stage.name not in config.skipped], title


def _why_embedded(on_disk: Mapping[str, int]) -> str:
    there = [
        f"{DATA_DIRS[name]} ({count} training shards)"
        for name, count in on_disk.items()
        if count and name != "embedded"
    ]
    said = " (no accelerator found: the preset for a CPU, which needs no network"
    if there:
        name = next(name for name in DATA_DIRS if on_disk.get(name))
        said += (
            f"; {' and '.join(there)} not used, as such a run takes far longer and downloads its "
            f"chats: --data {name} "
            "trains on it"
        )
    return said + ")"


def _fetch_stages(data: str, recipe: Recipe, have: int) -> list[Stage]:
    """Stages that fetch the tokenizer's shards first, then the rest in the background."""
    if data == "custom":  # made by the user
        if not have:
            raise UsageError(
                "there is no corpus of your own yet: make one with `python -m "
                "nanochat_jax.dataset hf` or "
                "`python -m nanochat_jax.dataset local`"
            )
        return []
    needed = shards_needed(recipe)
    first = min(needed, TOKENIZER_SHARDS)
    explained = f"{explain_shards(recipe, needed)}; {min(have, needed)} are there"
    stages = [
        Stage(
            name="data",
            module="nanochat_jax.dataset",
            args=as_flags(dataset=data) + ("-n", str(first)),
            produces=True,
            note=f"the first {first} of {explained}",
        )
    ]
    if needed > first:
        stages.append(
            Stage(
                name="data_rest",
                module="nanochat_jax.dataset",
                background=True,
                note=f"{needed} shards in all",
                args=as_flags(dataset=data) + ("-n", str(needed)),
            )
        )
    return stages


def next_commands(stages: Sequence[Stage], paths: Paths) -> str:
    """Commands to chat with the final model; "" if the pipeline made none."""
    source = next(
        (
            source
            for source in ("rl", "sft")
            if any(stage.name == f"chat_{source}" for stage in stages)
        ),
        None,
    )
    if source is None:
        return ""
    tag = Path(next(stage.checkpoints for stage in stages if stage.name == f"chat_{source}")).name
    flags = (["-i", source] if source != "sft" else []) + (
        ["-g", tag] if paths.find_tag(source) != tag else []
    )
    # `speedrun.sh` runs .venv/bin/python, which is not `python` in the user's shell.
    begun = [
        re.sub("^python ", f"{shlex.quote(sys.orig_argv[0])} ", cli.invocation(f"scripts.{name}"))
        for name in ("chat_cli", "serve")
    ]
    chat, page = (" ".join([command, *flags]) for command in begun)
    return f"talk to the model:  {chat}\nor in the browser:  {page}"


def main(config: SpeedrunConfig) -> int:
    paths = Paths.from_env()
    if paths.bucket:
        raise UsageError(
            "speedrun keeps its record and its checkpoints on one machine: unset "
            "NANOCHAT_CHECKPOINT_DIR, "
            "or run the stages one by one"
        )
    machine = Machine.probe(config.device_type)
    if config.device_type:
        os.environ["JAX_PLATFORMS"] = config.device_type  # inherited by the stages
    wandb_run = config.run or os.environ.get("WANDB_RUN") or "dummy"
    on_disk = {
        name: max(0, len(list(paths.data(name).glob("*.parquet"))) - 1) for name in DATA_DIRS
    }
    stages, title = plan_stages(config, machine, wandb_run, on_disk)
    if config.dry_run:
        print_plan(stages, machine, title)
        return 0
    print(title, file=sys.stderr)
    for directory in (paths.report, *([Path.cwd()] if stages[-1].name == "report" else [])):
        make_directory(directory)  # the last stage writes there: fail now, not then
    with lock_file(
        paths.base / ".speedrun.lock", f"the speedrun of {paths.base}", "wait for it or stop it"
    ):
        code = run_stages(stages, Record.open(paths, fresh=config.fresh))
    if code == 0 and (advice := next_commands(stages, paths)):
        print(advice, file=sys.stderr)
    return code


if __name__ == "__main__":
    cli.run(main, SpeedrunConfig, prog="scripts.speedrun", description=__doc__)

"""From a recipe and a machine to the stages of a run, with estimates of time and memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat_jax.cli import count, flag, inherited, parse, run_name
from nanochat_jax.data.needs import TOKENIZER_SHARDS, explain_shards, shards_needed
from nanochat_jax.devices import DeviceFlags, Processes
from nanochat_jax.errors import UsageError
from nanochat_jax.metrics import format_count, format_seconds
from nanochat_jax.model.compute import REMAT
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.recipe import Recipe
from nanochat_jax.model.sharding import mesh_shape
from nanochat_jax.model.size import flops_per_token, num_params
from nanochat_jax.paths import CHECKPOINT_DIRS, DATA_DIRS
from nanochat_jax.speedrun.machine import Machine
from nanochat_jax.speedrun.recipes import (
    NOT_IN_RECORD,
    RECORD,
    RECORD_DEPTH,
    SCALED,
    SMALL,
    SMALL_DEPTH,
    SMALL_DEVICE_BATCH,
    SMALL_RECORD,
    SMOKE,
    STAGE_NAMES,
    flag_value,
    read_recipe,
    replace_flags,
)
from nanochat_jax.speedrun.stages import Stage
from nanochat_jax.train.config import RunConfig, refuse_windows
from nanochat_jax.train.memory import estimate_memory
from nanochat_jax.train.pretrain import BaseTrainConfig, model_config, recipe

SOURCES = {"base_train": "base", "mid_train": "mid", "chat_sft": "sft", "chat_rl": "rl"}
PRODUCERS = {"data", "tok_train", *SOURCES}  # the other stages measure

# Size of one pass over the mixtures (tasks/mixtures.py), for estimates: conversations, tokens.
MIXTURES = {"mid_train": (848_000, 400e6), "chat_sft": (22_400, 12e6)}
SFT_FROM_BASE = (793_000, 400e6)
SFT_ROWS, SFT_DEVICE_BATCH = 32, 4

# Estimated seconds of the stages whose FLOPs are not counted.
SCALED_SECONDS = dict(tok_train=100, tok_eval=5, report=3)
SMALL_SECONDS = SCALED_SECONDS | dict(data=10, tok_train=5, base_loss=20, base_eval=20)
SMALL_SECONDS |= dict(chat_eval_mid=30, chat_eval_sft=30, chat_rl=300, chat_eval_rl=30)


@dataclass(frozen=True, kw_only=True)
class SpeedrunConfig(DeviceFlags):
    mesh: str = inherited(Processes, "mesh")
    recipe: str = flag(
        "guide",
        "guide: base, midtraining, SFT; record: as upstream in 2026, 8 tokens per parameter, "
        "float8 on GPUs that have it, then SFT straight from base",
        choices=["guide", "record"],
    )
    depth: int | None = count(
        None,
        "number of layers, from which all settings follow; default 20, of the record "
        f"{RECORD_DEPTH}, {SMALL_DEPTH} on a CPU",
        short="-d",
        at_most=1000,
    )
    data: str | None = flag(
        None,
        "corpus; default: the one on disk, else climbmix; on a CPU embedded, which needs no "
        "network",
        choices=[*DATA_DIRS],
    )
    device_batch_size: int | Literal["auto"] | None = count(
        None,
        "rows per device and micro-step of base, mid and SFT; auto: the most that fit; default by "
        "the device's memory",
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
        "name of the run in the tracker; dummy: none; default $WANDB_RUN, else dummy",
        check=run_name,
    )
    tracker: str | None = inherited(RunConfig, "tracker")
    resume: bool = flag(False, "continue the last run and skip its finished stages (the default)")
    fresh: bool = flag(False, "start a new run: every stage runs again and replaces its old result")
    skip: str | None = flag(
        None, "stages to skip, separated by commas; data: train on the shards on disk"
    )
    with_rl: bool = flag(False, "add reinforcement learning and its evaluation after SFT")
    smoke: bool = flag(
        False, "a few steps per stage, to try an installation; the model learns nothing"
    )
    dry_run: bool = flag(False, "print the plan and exit")

    def __post_init__(self) -> None:
        refuse_windows()
        if self.remat == "elementwise":  # the old name of "minimal"
            object.__setattr__(self, "remat", "minimal")
        if self.resume and self.fresh:
            raise ValueError(
                "`resume` continues the last run and `fresh` starts a new one: use only one of them"
            )
        unknown = [name for name in self.skipped if name not in STAGE_NAMES]
        if unknown:
            raise ValueError(
                f"`skip={','.join(unknown)}`: unknown stage; the stages are "
                f"{', '.join(STAGE_NAMES)}"
            )

    @property
    def skipped(self) -> list[str]:
        names = [name for name in (self.skip or "").split(",") if name]
        return names + ["data_rest"] if "data" in names else names


def plan_stages(
    config: SpeedrunConfig, machine: Machine, run: str, on_disk: Mapping[str, int]
) -> tuple[list[Stage], str]:
    """(the stages of this run in order, a title)."""
    plan = _Plan(config, machine, run, on_disk)
    stages = [plan.stage(name, command) for name, command in plan.commands.items()]
    title = f"speedrun: d{plan.depth} on {plan.data}" + (", the record" if plan.record else "")
    if machine.platform == "cpu" and not config.data:
        title += f" ({_why_embedded(on_disk)})"
    return [stage for stage in stages if stage.name not in config.skipped], title


class _Plan:
    """What the stages of one run share."""

    def __init__(
        self, config: SpeedrunConfig, machine: Machine, run: str, on_disk: Mapping[str, int]
    ) -> None:
        self.config, self.machine, self.run = config, machine, run
        self.cpu = machine.platform == "cpu"
        self.record = config.recipe == "record"
        full_depth = RECORD_DEPTH if self.record else 20
        self.depth = config.depth or (SMALL_DEPTH if self.cpu else full_depth)
        found = next((name for name in DATA_DIRS if on_disk.get(name)), "climbmix")
        self.data = config.data or ("embedded" if self.cpu else found)
        self.have = on_disk.get(self.data, 0)
        self.small = self.data == "embedded"
        self.ways, _ = mesh_shape(config.mesh, machine.count, machine.platform)
        self.commands = read_recipe(
            SMALL if self.small else SCALED, depth=self.depth, data=self.data
        )
        if self.record:
            for name in NOT_IN_RECORD:
                del self.commands[name]
            self._replace(SMALL_RECORD if self.small else RECORD)
            if machine.float8:
                self.commands["base_train"] += ["--precision", "fp8"]
        if config.smoke:
            self._replace(SMOKE)
        if not config.with_rl:
            del self.commands["chat_rl"], self.commands["chat_eval_rl"]
        self.model, self.recipe = _model_and_recipe(self.commands)
        if not self.small:
            self._count_shards()

    def _replace(self, flags_by_stage: str) -> None:
        """Replace or add flags of the stages that run."""
        for name, flags in read_recipe(flags_by_stage).items():
            if name in self.commands:
                self.commands[name] = replace_flags(self.commands[name], flags)

    def _count_shards(self) -> None:
        """Fetch the tokenizer's shards first, then the rest in the background."""
        if self.data == "custom":  # made by the user
            if not self.have:
                raise UsageError(
                    "there is no corpus of your own yet: make one with `python -m "
                    "nanochat_jax.dataset hf` or `python -m nanochat_jax.dataset local`"
                )
            del self.commands["data"], self.commands["data_rest"]
            return
        self.shards = shards_needed(self.recipe)
        self.first_shards = min(self.shards, TOKENIZER_SHARDS)
        for name, number in (("data", self.first_shards), ("data_rest", self.shards)):
            self.commands[name] = replace_flags(self.commands[name], ["-n", str(number)])
        if self.shards == self.first_shards:
            del self.commands["data_rest"]

    def stage(self, name: str, command: list[str]) -> Stage:
        seconds: float = (SMALL_SECONDS if self.small else SCALED_SECONDS).get(name, 0)
        note, source = self._note(name), SOURCES.get(name)
        checkpoints = f"{CHECKPOINT_DIRS[source]}/d{self.depth}" if source else ""
        if name in ("base_train", *MIXTURES):
            tokens, step_tokens, length = self._length(name)
            rows, memory = self._rows(name, step_tokens)
            seconds = self._training_seconds(tokens)
            note = f"{num_params(self.model) / 1e6:.1f}M parameters, {length}, {memory}"
        else:
            rows = self._device_batch() if name == "base_loss" else None
        return Stage(
            name=name,
            module=command[0],
            args=tuple(command[1:]),
            placement=self._placement(name, rows),
            produces=name in PRODUCERS,
            checkpoints=checkpoints,
            background=name == "data_rest",
            waits_for="data_rest" if name == "base_train" else "",
            note=note,
            seconds=seconds,
        )

    def _placement(self, name: str, rows: int | str | None) -> tuple[str, ...]:
        """The flags that depend on the machine, the same for every recipe."""
        trains, config = name in SOURCES, self.config
        flags: list[str] = []
        if name.startswith(("base", "mid", "chat")):
            flags += ["--mesh", config.mesh]
        if rows is not None:
            flags += ["--device-batch-size", str(rows)]
        if trains and config.remat:
            flags += ["--remat", config.remat]
        if trains and config.fsdp:
            flags += ["--fsdp"]
        if trains and name != "chat_rl":
            flags += ["--save-every", "100" if self.small else "1000"]
        if trains:
            flags += ["--run", self.run]
        if trains and self.config.tracker:
            flags += ["--tracker", self.config.tracker]
        return tuple(flags)

    def _device_batch(self) -> int:
        """Rows per device of all models with this depth, in the memory of one of 80 GB."""
        if isinstance(self.config.device_batch_size, int):
            return self.config.device_batch_size
        if self.small:
            return SMALL_DEVICE_BATCH
        return 32 if self.depth < 20 else 16 if self.depth < 28 else 8

    def _rows(self, name: str, step_tokens: int) -> tuple[int | str | None, str]:
        """(rows per device, None if the stage decides; the plan's words on memory)."""
        config = self.config
        if config.device_batch_size is None and not self.cpu:
            return None, "rows per device by its memory"
        if config.device_batch_size == "auto":
            return "auto", "as many rows per device as fit"
        rows = self._device_batch()
        if name == "chat_sft" and not self.record:
            rows = min(rows, SMALL_DEVICE_BATCH if self.small else SFT_DEVICE_BATCH)
        step_rows = -(-step_tokens // self.model.sequence_len // self.ways)  # per device
        needed = estimate_memory(
            self.model,
            min(rows, step_rows),
            data=self.ways,
            remat=config.remat or "none",
            fsdp=config.fsdp,
            gpu=self.machine.platform == "gpu",
        )
        # otherwise the stage chooses both: it can measure the device's memory
        fixed = self.cpu or (config.remat and config.fsdp)
        limit = "about" if fixed else "at most about"
        return rows, f"{limit} {needed / 2**30:.1f} GiB per device"

    def _length(self, name: str) -> tuple[float, int, str]:
        """(tokens of a training stage, tokens per step, the plan's words on both)."""
        recipe, command = self.recipe, self.commands[name]
        if name == "base_train":
            steps, step_tokens = recipe.num_iterations, recipe.total_batch_size
            tokens: float = recipe.total_tokens
        else:
            default = recipe.total_batch_size
            if name == "chat_sft" and not self.record:
                default = SFT_ROWS * self.model.sequence_len
            step_tokens = int(flag_value(command, "--total-batch-size", str(default)))
            steps = int(flag_value(command, "--num-iterations", "0"))
            tokens = steps * step_tokens
        if steps:
            return tokens, step_tokens, f"{format_count(tokens)} tokens in {steps:,} steps"
        conversations, tokens = SFT_FROM_BASE if self.record else MIXTURES[name]
        return (
            tokens,
            step_tokens,
            f"one pass over {conversations:,} conversations, about {tokens / 1e6:,.0f}M tokens in "
            f"{tokens / step_tokens:,.0f} steps",
        )

    def _training_seconds(self, tokens: float) -> float:
        recomputing = 4 / 3 if self.config.remat in ("block", "full") else 1.0
        return tokens * flops_per_token(self.model) * recomputing / self.machine.training_flops

    def _note(self, name: str) -> str:
        if name == "data" and self.small:
            return "12 MB of speeches from an installed package"
        if name == "data":
            explained = explain_shards(self.recipe, self.shards)
            have = min(self.have, self.shards)
            return f"the first {self.first_shards} of {explained}; {have} are on disk"
        if name == "data_rest":
            return f"{self.shards} shards in all"
        if name == "tok_train":
            return f"vocabulary of {self.model.vocab_size:,}"
        if name == "chat_rl":
            return "word problems with the calculator, and spelling" if self.small else "GSM8K"
        return ""


def _model_and_recipe(commands: Mapping[str, list[str]]) -> tuple[GPTConfig, Recipe]:
    """The model that `base_train` makes of its flags, and its training recipe."""
    module, *arguments = commands["base_train"]
    base = parse(BaseTrainConfig, arguments, prog=module, description=None)
    vocab_size = int(flag_value(commands["tok_train"], "--vocab-size", ""))
    model, reference = model_config(base, vocab_size)
    return model, recipe(base, model, reference)


def _why_embedded(on_disk: Mapping[str, int]) -> str:
    text = "no accelerator found: the preset for a CPU, which needs no network"
    others = {name: count for name, count in on_disk.items() if count and name != "embedded"}
    if not others:
        return text
    unused = " and ".join(
        f"{DATA_DIRS[name]} ({count} training shards)" for name, count in others.items()
    )
    return (
        f"{text}; {unused} not used: training on it takes far longer and downloads chat data; "
        f"`data={next(iter(others))}` trains on it"
    )


def print_plan(stages: Sequence[Stage], machine: Machine, title: str) -> None:
    print(title)
    print(f"machine: {machine.count} x {machine.kind} ({machine.platform})")
    for number, stage in enumerate(stages, 1):
        where = "in the background" if stage.background else ""
        estimate = f"about {format_seconds(stage.seconds)}" if stage.seconds else ""
        details = "; ".join(filter(None, [stage.note, where, estimate]))
        print(f"{number:3d}. {stage.name:14s} {details}")
        print(f"     {stage.text()}")
    unknown = [stage.name for stage in stages if not (stage.seconds or stage.background)]
    without = f", without {', '.join(unknown)}" if unknown else ""
    total = format_seconds(sum(stage.seconds for stage in stages))
    print(f"estimated time in all{without}: {total} (an estimate from FLOPs, not a measurement)")

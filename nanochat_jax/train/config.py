"""Flags that several training stages share. A stage's own flags are in its module.

`RunConfig` is what the loop needs, `TrainConfig` adds text, `ContinueConfig` an earlier stage's
model, `FinetuneConfig` both.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal

from nanochat_jax.cli import LARGEST, LARGEST_SEED, count, directory_name, flag, inherited, run_name
from nanochat_jax.devices import ModelFlags, Processes
from nanochat_jax.metrics import TRACKERS
from nanochat_jax.model.compute import ATTENTION, DTYPES, REMAT
from nanochat_jax.tasks.mixtures import mixture_entries


def rate(default: float | None, help: str) -> Any:
    """A flag for a learning rate or a weight decay."""
    return flag(default, help, at_least=0, at_most=100)


def factor(default: float | None, help: str, **options: Any) -> Any:
    """A flag for a positive factor."""
    return flag(default, help, at_least=1e-9, at_most=1000, **options)


def fraction(default: float | None, help: str) -> Any:
    """A flag for a number from 0 to 1."""
    return flag(default, help, at_least=0, at_most=1)


def refuse_windows() -> None:
    """Raise ValueError on Windows, which lacks the locks and signals that training needs."""
    if os.name == "nt":
        raise ValueError(
            "training runs on Linux and macOS only: on Windows, use WSL2 or a container "
            "(docs/platforms.md)"
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Processes):
    """Flags of every training stage."""

    run: str = flag("dummy", "name of the run in the tracker; dummy: none", check=run_name)
    tracker: str | None = flag(
        None,
        "where curves are logged: wandb; trackio, on this machine and without an account; none. "
        "Default wandb if the run has a name",
        choices=[*TRACKERS],
    )
    fsdp: bool | None = flag(
        None, "shard the parameters over the data axis too; default: if memory requires it"
    )
    dtype: str = flag("auto", "compute dtype", choices=["auto", *DTYPES])
    precision: str = flag(
        "bf16",
        "precision of the layers' matmuls in training: bf16 (the compute dtype); fp8 (H100 and "
        "later); int8 (TPU v5e, v5p, v6e). A resumed run may change it",
        choices=["bf16", "fp8", "int8"],
    )
    table_dtype: str = flag(
        "auto",
        "dtype of the embedding tables and their optimizer state in memory; auto: the compute "
        "dtype for modern on accelerators, else float32. Checkpoints hold float32",
        choices=["auto", *DTYPES],
    )
    fp8: bool = flag(False, "the same as --precision fp8")
    fp8_recipe: str = flag(
        "tensorwise",
        "scales of fp8: one per tensor, or per row and column (slower, more accurate)",
        choices=["tensorwise", "rowwise"],
    )
    remat: str = flag(
        "auto",
        "activations that the backward pass recomputes, to save memory: none; minimal: all but "
        "matmuls and attention; block: all inside of layers; full: most layers' inputs too (no "
        "effect on a CPU, whose compiler undoes it); auto: chosen by memory",
        choices=["auto", *REMAT, "elementwise"],
    )
    attention: str = flag(
        "auto",
        "attention kernel; auto: splash on TPUs, cudnn on NVIDIA GPUs, else xla",
        choices=ATTENTION,
    )
    device_batch_size: int | Literal["auto"] | None = count(
        None,
        "rows per device and micro-step; auto: the most that fit into memory, by compiling; "
        "default 32, or 16 or 8 if more should not fit",
        at_most=10**6,
    )
    num_iterations: int = count(-1, "optimizer steps; -1: the recipe's horizon", also=-1)
    eval_every: int = count(250, "steps between evaluations; -1: only at the end", also=-1)
    save_every: int = count(
        -1,
        "steps between checkpoints; -1: before every evaluation; 0: only at the end",
        at_least=0,
        also=-1,
    )
    keep: int = count(2, "number of newest checkpoints to keep")
    resume: bool = flag(False, "continue from the newest checkpoint of this tag, if there is one")
    resume_from_step: int = count(
        -1,
        "continue from this step of the tag; later ones are renamed. -1: see --resume",
        at_least=0,
        also=-1,
    )
    fresh: bool = flag(False, "delete the checkpoints that this tag already has, and start over")
    model_tag: str | None = flag(
        None, "name of the checkpoint directory; default d<depth>", check=directory_name
    )
    seed: int = count(42, "seed of the initial weights", at_least=0, at_most=LARGEST_SEED)
    profile: str | None = flag(
        None,
        "START:STOP, steps to trace for xprof; the trace goes to profile/ beside the checkpoints",
    )
    compile_cache: bool = flag(
        True, "keep compiled programs under the base directory for the next start"
    )

    def __post_init__(self) -> None:
        refuse_windows()
        if self.remat == "elementwise":  # the mode's former name
            object.__setattr__(self, "remat", "minimal")
        if self.resuming and self.fresh:
            raise ValueError(
                "`resume` continues from a tag's checkpoints, `fresh` deletes them: choose one"
            )
        if self.fp8 and self.precision == "int8":
            raise ValueError("`fp8` and `precision=int8` are alternatives: choose one")
        if self.fp8_recipe != "tensorwise" and not self.step_precision.startswith("fp8"):
            raise ValueError(f"`fp8_recipe={self.fp8_recipe}` needs `precision=fp8`")
        self.profiled_steps  # noqa: B018  (raises if it is malformed)

    @property
    def step_precision(self) -> str:
        """`Compute.precision` of the training step."""
        if not (self.fp8 or self.precision == "fp8"):
            return self.precision
        return "fp8" if self.fp8_recipe == "tensorwise" else "fp8_rowwise"

    @property
    def resuming(self) -> bool:
        return self.resume or self.resume_from_step >= 0

    @property
    def profiled_steps(self) -> range:
        if self.profile is None:
            return range(0)
        start, colon, stop = self.profile.partition(":")
        if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
            raise ValueError(
                f"`profile` {self.profile!r} is not START:STOP, two steps such as 10:13"
            )
        return range(int(start), int(stop))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Flags of the stages that train on text."""

    total_batch_size: int = count(
        -1,
        "tokens per optimizer step; -1: the recipe's, or those of the base run",
        at_most=2**40,
        also=-1,
    )
    eval_tokens: int = count(20 * 524288, "tokens of an evaluation", at_most=LARGEST)


@dataclass(frozen=True, kw_only=True)
class ContinueConfig(RunConfig):
    """Flags of a stage that continues another stage's model."""

    model_tag: str | None = inherited(ModelFlags, "model_tag")
    step: int | None = inherited(ModelFlags, "step")
    embedding_lr: float | None = rate(
        None, "learning rate of the embedding tables; default the base run's"
    )
    unembedding_lr: float | None = rate(
        None, "learning rate of the unembedding; default the base run's"
    )
    matrix_lr: float | None = rate(
        None, "learning rate of the matrices (Muon); default the base run's"
    )
    weight_decay: float = rate(0.0, "modern: Muon's cautious decay; classic: AdamW's")
    init_lr_frac: float = factor(1.0, "factor of all learning rates")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ContinueConfig, TrainConfig):
    """Flags of midtraining and SFT."""

    load_optimizer: bool = flag(
        False, "load the previous stage's optimizer state; learning-rate schedules restart"
    )
    mixture: str | None = flag(
        None,
        "training data, such as SmolTalk:10000,MMLU*3,chats.jsonl: tasks or files of "
        "conversations, each with a weight (*) or a number of conversations (:); default: the "
        "corpus's mixture",
        check=mixture_entries,
    )
    max_seq_len: int | None = count(
        None, "tokens of a row; default the base model's", at_most=2**24
    )
    dry_run: bool = flag(False, "save no checkpoint and no section of the report")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resuming and self.dry_run:
            raise ValueError(
                "`dry_run` starts over and saves nothing, `resume` continues from a checkpoint: "
                "choose one"
            )

"""The two finetuning stages: midtraining and SFT."""

from dataclasses import dataclass
from typing import Any, Literal

from nanochat_jax.checkpoint import Loaded
from nanochat_jax.cli import LARGEST, count, flag, inherited
from nanochat_jax.eval.chat import Generator, Sampling, accuracy, chatcore, evaluate_task
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.weights import Params
from nanochat_jax.paths import Paths
from nanochat_jax.tasks import eval_tasks_for, load_eval_task
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.mixtures import Split, mixture_for
from nanochat_jax.train.config import FinetuneConfig, TrainConfig, factor, fraction
from nanochat_jax.train.finetune import Stage, finetune
from nanochat_jax.train.job import Evaluation
from nanochat_jax.train.optim import Schedule, constant, trapezoid


@dataclass(frozen=True, kw_only=True)
class MidTrainConfig(FinetuneConfig):
    eval_every: int = inherited(TrainConfig, "eval_every", 150)
    warmdown_ratio: float = fraction(0.2, "share of the run with falling learning rate")


def midtrain(config: MidTrainConfig) -> None:
    """Teach the chat format, tools and skills. The loss is over all tokens of the conversations."""
    finetune(
        Stage(
            config=config,
            name="mid_train",
            section="Midtraining",
            source="base",
            target="mid",
            mode="stream",
            primary="val_bpb",
            num_epochs=1,
            step_rows=None,
            mixture=lambda data, split, paths: mixture_for(
                data, "mid", split, paths, named=config.mixture
            ),
            lr_schedule=lambda steps: trapezoid(
                steps, warmup=0, warmdown_ratio=config.warmdown_ratio, final_fraction=0.0
            ),
        )
    )


# Defaults of SFT after midtraining, as upstream in December 2025, and straight from the base model,
# as upstream in 2026: its batch and its optimizer state, a high learning rate, more evaluation.
SFT_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "device_batch_size": (4, None),  # None: by memory
    "target_examples_per_step": (32, None),
    "init_lr_frac": (0.02, 0.8),
    "warmdown_ratio": (1.0, 0.5),
    "load_optimizer": (False, True),
    "eval_every": (100, 200),
    "eval_tokens": (20 * 524288, 40 * 524288),
    "chatcore_every": (-1, 200),
}


def _by_source(name: str) -> str:
    """The defaults of a setting that `source` decides, for its help."""
    mid, base = SFT_DEFAULTS[name]
    return f"default {mid}, from base {base}"


@dataclass(frozen=True, kw_only=True)
class ChatSFTConfig(FinetuneConfig):
    """None stands for the value in `SFT_DEFAULTS`, which `__post_init__` fills in."""

    source: str = flag("mid", "stage to start from", choices=["base", "mid"])
    packing: str = flag(
        "rows",
        "how conversations fill rows; rows: several, best fit; single: one per row, as upstream "
        "until 2026",
        choices=["rows", "single"],
    )
    num_epochs: int = count(1, "passes over the mixture", at_most=10**6)
    device_batch_size: int | Literal["auto"] | None = count(
        None,
        "rows per device and micro-step; auto: the most that fit into memory; default 4, from "
        "base by memory",
        at_most=10**6,
    )
    target_examples_per_step: int | None = count(
        None,
        "rows per step, unless --total-batch-size is set; default 32, from base as many tokens "
        "as in the base run's steps",
    )
    init_lr_frac: float = factor(
        None, f"factor of all learning rates; {_by_source('init_lr_frac')}"
    )
    load_optimizer: bool = flag(
        None,
        "load the previous stage's optimizer state; learning-rate schedules restart; "
        f"{_by_source('load_optimizer')}",
    )
    warmup_ratio: float = fraction(0.0, "share of the run with rising learning rate")
    warmdown_ratio: float = fraction(
        None, f"share of the run with falling learning rate; {_by_source('warmdown_ratio')}"
    )
    final_lr_frac: float = fraction(0.0, "learning rate at the end, as a share of its peak")
    eval_every: int = count(
        None, f"steps between evaluations; -1: only at the end; {_by_source('eval_every')}", also=-1
    )
    eval_tokens: int = count(
        None, f"tokens of an evaluation; {_by_source('eval_tokens')}", at_most=LARGEST
    )
    eval_steps: int | None = count(None, "batches per evaluation; overrides --eval-tokens")
    mmlu_epochs: int | None = count(
        None, "passes over MMLU in the mixture; default 0, from base 3", at_least=0, at_most=10**6
    )
    gsm8k_epochs: int | None = count(
        None, "passes over GSM8K; default 1, from base 4", at_least=0, at_most=10**6
    )
    chatcore_every: int = count(
        None,
        "steps between evaluations of the chat tasks; -1: none, scripts.chat_eval runs them at "
        f"the end; {_by_source('chatcore_every')}",
        aliases=("eval_metrics_every",),
        also=-1,
    )
    chatcore_max_cat: int = count(
        -1,
        "problems of each multiple-choice task; -1: all",
        aliases=("eval_metrics_max_problems",),
        also=-1,
    )
    chatcore_max_sample: int = count(
        24, "problems of each task whose replies are generated; -1: all", also=-1
    )

    def __post_init__(self) -> None:
        for name, values in SFT_DEFAULTS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, values[self.source == "base"])
        super().__post_init__()


def supervised_finetune(config: ChatSFTConfig) -> None:
    """Teach to reply. The loss is over the assistant's tokens only."""

    def mixture(data: str | None, split: Split, paths: Paths) -> Task:
        return mixture_for(
            data,
            "sft",
            split,
            paths,
            named=config.mixture,
            after=config.source,
            mmlu_epochs=config.mmlu_epochs,
            gsm8k_epochs=config.gsm8k_epochs,
        )

    def lr_schedule(steps: int) -> Schedule:
        return trapezoid(
            steps,
            warmup=round(config.warmup_ratio * steps),
            warmdown_ratio=config.warmdown_ratio,
            final_fraction=config.final_lr_frac,
        )

    finetune(
        Stage(
            config=config,
            name="chat_sft",
            section="Chat SFT",
            source=config.source,
            target="sft",
            mode=config.packing,
            primary="val_loss",
            num_epochs=config.num_epochs,
            step_rows=config.target_examples_per_step,
            mixture=mixture,
            lr_schedule=lr_schedule,
            classic_momentum=constant(0.95),
            eval_steps=config.eval_steps,
            evaluations=lambda *model: _chat_tasks(config, *model),
        )
    )


def _chat_tasks(
    config: ChatSFTConfig, loaded: Loaded, rows: int, compute: Compute
) -> list[Evaluation]:
    """The evaluation of the corpus's chat tasks and ChatCORE, if requested."""
    if config.chatcore_every < 1:
        return []
    paths = Paths.from_env()
    tasks = [load_eval_task(name, paths) for name in eval_tasks_for(loaded.meta["data"])]

    def run(params: Params) -> dict[str, float]:
        generator = Generator(
            config=loaded.config,
            params=params,
            tokenizer=loaded.tokenizer,
            num_slots=rows,
            compute=compute,
        )
        accuracies = {}
        for task in tasks:
            categorical = task.eval_type == "categorical"
            limit = config.chatcore_max_cat if categorical else config.chatcore_max_sample
            problems = task.view(stop=limit if limit > 0 else None)
            accuracies[task.key] = accuracy(evaluate_task(problems, generator, Sampling()))
        return accuracies | chatcore(accuracies, {task.key: task.baseline for task in tasks})

    return [Evaluation(config.chatcore_every, run)]

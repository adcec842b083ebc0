"""The two finetuning stages: midtraining and SFT."""

from dataclasses import dataclass
from typing import Literal

from nanochat_jax.checkpoint import Loaded
from nanochat_jax.cli import flag
from nanochat_jax.eval.chat import Generator, Sampling, accuracy, chatcore, evaluate_task
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.weights import Params
from nanochat_jax.paths import Paths
from nanochat_jax.tasks import eval_tasks_for, load_eval_task
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.mixtures import Split, mixture_for
from nanochat_jax.train.config import FinetuneConfig, TrainConfig, count, fraction, inherited
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


@dataclass(frozen=True, kw_only=True)
class ChatSFTConfig(FinetuneConfig):
    source: str = flag("mid", "stage to start from", choices=["base", "mid"])
    packing: str = flag(
        "rows",
        "how conversations fill rows; rows: several, best fit; single: one per row, as upstream "
        "until 2026",
        choices=["rows", "single"],
    )
    num_epochs: int = count(1, "passes over the mixture", at_most=10**6)
    device_batch_size: int | Literal["auto"] = count(
        4, "rows per device and micro-step; auto: the most that fit into memory", at_most=10**6
    )
    target_examples_per_step: int = count(32, "rows per step, unless --total-batch-size is set")
    init_lr_frac: float = inherited(FinetuneConfig, "init_lr_frac", 0.02)
    warmup_ratio: float = fraction(0.0, "share of the run with rising learning rate")
    warmdown_ratio: float = inherited(MidTrainConfig, "warmdown_ratio", 1.0)
    final_lr_frac: float = fraction(0.0, "learning rate at the end, as a share of its peak")
    eval_every: int = inherited(TrainConfig, "eval_every", 100)
    eval_steps: int | None = count(None, "batches per evaluation; overrides --eval-tokens")
    mmlu_epochs: int | None = count(
        None, "passes over MMLU in the mixture; default 0, from base 3", at_least=0, at_most=10**6
    )
    gsm8k_epochs: int | None = count(
        None, "passes over GSM8K; default 1, from base 4", at_least=0, at_most=10**6
    )
    chatcore_every: int = count(
        -1,
        "steps between evaluations of the chat tasks; -1: none, scripts.chat_eval runs them at "
        "the end",
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

"""Finetune the midtrained model on conversations; only the assistant's tokens are trained.

python -m scripts.chat_sft --mesh 8x1
python -m scripts.chat_sft --source base --load-optimizer   no midtraining, as upstream in 2026
"""

from dataclasses import dataclass
from typing import Any, Literal

from nanochat_jax import cli
from nanochat_jax.checkpoint import Loaded
from nanochat_jax.cli import flag
from nanochat_jax.eval.chat import Generator, Sampling, accuracy, chatcore, evaluate_task
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.weights import Params
from nanochat_jax.paths import Paths
from nanochat_jax.tasks import eval_tasks_for, load_eval_task
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.mixtures import Split, mixture_for
from nanochat_jax.train.finetune import FinetuneConfig, Stage, finetune
from nanochat_jax.train.loop import Evaluation
from nanochat_jax.train.optim import constant, trapezoid


@dataclass(frozen=True, kw_only=True)
class ChatSFTConfig(FinetuneConfig):
    source: str = flag("mid", "stage to start from", choices=["base", "mid"])
    packing: str = flag(
        "rows",
        "how conversations fill rows; rows: several, best fit; single: one a row, as upstream "
        "until 2026",
        choices=["rows", "single"],
    )
    num_epochs: int = flag(1, "passes over the mixture", at_least=1, at_most=10**6)
    device_batch_size: int | Literal["auto"] = flag(
        4,
        "rows per device and micro-step; auto: the most that fit into memory",
        at_least=1,
        at_most=10**6,
    )
    target_examples_per_step: int = flag(
        32, "rows of a step, where --total-batch-size is not given", at_least=1, at_most=10**9
    )
    init_lr_frac: float = flag(0.02, "factor of all rates", at_least=1e-9, at_most=1000)
    warmup_ratio: float = flag(0.0, "share of the run with rising rate", at_least=0, at_most=1)
    warmdown_ratio: float = flag(1.0, "share of the run with falling rate", at_least=0, at_most=1)
    final_lr_frac: float = flag(
        0.0, "rate at the end, as a share of its peak", at_least=0, at_most=1
    )
    eval_every: int = flag(
        100, "steps between evaluations; -1: only at the end", at_least=1, at_most=10**9, also=-1
    )
    eval_steps: int | None = flag(
        None, "batches of an evaluation, instead of --eval-tokens", at_least=1, at_most=10**9
    )
    mmlu_epochs: int | None = flag(
        None, "passes over MMLU in the mixture; default 0, from base 3", at_least=0, at_most=10**6
    )
    gsm8k_epochs: int | None = flag(
        None, "passes over GSM8K; default 1, from base 4", at_least=0, at_most=10**6
    )
    chatcore_every: int = flag(
        -1,
        "steps between evaluations of the chat tasks; -1: none, scripts.chat_eval does it at the "
        "end",
        aliases=("eval_metrics_every",),
        at_least=1,
        at_most=10**9,
        also=-1,
    )
    chatcore_max_cat: int = flag(
        -1,
        "problems of each multiple-choice task; -1: all",
        aliases=("eval_metrics_max_problems",),
        at_least=1,
        at_most=10**9,
        also=-1,
    )
    chatcore_max_sample: int = flag(
        24,
        "problems of each task whose replies are generated; -1: all",
        at_least=1,
        at_most=10**9,
        also=-1,
    )


def chat_tasks(
    config: ChatSFTConfig, model: Loaded, rows: int, compute: Compute
) -> list[Evaluation]:
    """The evaluation of the corpus's chat tasks and ChatCORE, if requested."""
    if config.chatcore_every < 1:
        return []
    paths = Paths.from_env()
    tasks = [load_eval_task(name, paths) for name in eval_tasks_for(model.meta["data"])]

    def run(params: Params) -> dict[str, float]:
        generator = Generator(
            config=model.config,
            params=params,
            tokenizer=model.tokenizer,
            num_slots=rows,
            compute=compute,
        )
        found = {}
        for task in tasks:
            limit = (
                config.chatcore_max_cat
                if task.eval_type == "categorical"
                else config.chatcore_max_sample
            )
            found[task.key] = accuracy(
                evaluate_task(task.view(stop=limit if limit > 0 else None), generator, Sampling())
            )
        return found | chatcore(found, {task.key: task.baseline for task in tasks})

    return [Evaluation(config.chatcore_every, run)]


def main(config: ChatSFTConfig) -> None:
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

    def lr_schedule(steps: int) -> Any:
        return trapezoid(
            steps,
            warmup=round(config.warmup_ratio * steps),
            warmdown_ratio=config.warmdown_ratio,
            final_fraction=config.final_lr_frac,
        )

    finetune(
        config,
        Stage(
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
            evaluations=lambda *model: chat_tasks(config, *model),
        ),
    )


if __name__ == "__main__":
    cli.run(main, ChatSFTConfig, prog="scripts.chat_sft", description=__doc__)

"""Evaluate a chat model on tasks: multiple choice by the likeliest letter, all others by what it writes.

    python -m scripts.chat_eval -i sft
    python -m scripts.chat_eval -i sft -a "ARC-Easy|GSM8K" -x 100
    python -m scripts.chat_eval -i sft --task-file questions.jsonl
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import jax

from nanochat_jax import cli, report
from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import flag
from nanochat_jax.eval.chat import Generator, Sampling, accuracy, chatcore, evaluate_task, write_problems
from nanochat_jax.infer.request import Request
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.sharding import data_size, make_mesh
from nanochat_jax.paths import CHECKPOINT_DIRS, Paths
from nanochat_jax.startup import ModelFlags, Processes, start
from nanochat_jax.tasks import eval_task_name, eval_tasks_for, load_eval_task
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.custom_json import CustomJSON

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChatEvalConfig(ModelFlags, Processes):
    source: str = flag("sft", "stage of the model", short="-i", choices=[*CHECKPOINT_DIRS])
    task_name: str | None = flag(None, "tasks joined by |; default those that fit the model's corpus", short="-a")
    task_file: str | None = flag(None, "judge by this JSON Lines file instead: conversations, or questions with choices")
    temperature: float = flag(0.0, "of the replies; 0 takes the most likely token", short="-t")
    max_new_tokens: int = flag(512, "longest reply", short="-m", at_least=1)
    num_samples: int = flag(1, "replies per problem; one that is right passes", short="-n", at_least=1)
    top_k: int = flag(50, "sample among the k likeliest tokens; 0: all", short="-k")
    batch_size: int = flag(32, "replies in flight per device, and multiple-choice prompts of a batch", short="-b", at_least=1)
    max_problems: int | None = flag(None, "problems of each task; default all", short="-x", at_least=1)
    mesh: str = flag("auto", "devices as DxM: D-way data and M-way tensor parallelism")

    def __post_init__(self) -> None:
        Request((0,), max_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k)  # checks the ranges
        if self.task_name and self.task_file:
            raise ValueError("--task-name and --task-file: give one of them")


def main(config: ChatEvalConfig) -> None:
    paths = Paths.from_env()
    start(paths, processes=config)
    mesh = make_mesh(config.mesh)
    # All tasks are loaded before any is judged, and those that were named before the model: one that is missing should not
    # be found out after an hour, and a typo not after a minute.
    tasks: list[Task] = []
    if config.task_file:
        tasks = [CustomJSON(Path(config.task_file))]
    elif config.task_name:
        names = [eval_task_name(name) for name in config.task_name.split("|")]  # all, before the first one is downloaded
        tasks = [load_eval_task(name, paths) for name in names]
    loaded = load_model(paths, config.source, tag=config.model_tag, step=config.step, mesh=mesh)
    tasks = tasks or [load_eval_task(name, paths) for name in eval_tasks_for(loaded.meta["data"])]
    tasks = [task.view(stop=config.max_problems) for task in tasks]

    slots = config.batch_size * data_size(mesh)
    generator = Generator(config=loaded.config, params=loaded.params, tokenizer=loaded.tokenizer, num_slots=slots,
                          compute=Compute.on(mesh, dtype=config.dtype))
    sampling = Sampling(num_samples=config.num_samples, max_new_tokens=config.max_new_tokens,
                        temperature=config.temperature, top_k=config.top_k)
    results: dict[str, float] = {}
    for task in tasks:
        problems = evaluate_task(task, generator, sampling)
        results[task.key] = accuracy(problems)
        if jax.process_index() == 0:
            directory = paths.logs(config.source) / loaded.tag
            write_problems(directory / f"chat_eval_{task.key}.jsonl", problems)
    results |= chatcore(results, {task.key: task.baseline for task in tasks})
    for name, value in results.items():
        log.info("%-20s %6.2f%%", name, 100 * value)
    if jax.process_index() == 0:
        report.log_section(
            paths.report, f"Chat evaluation {config.source}",
            [f"Model: {loaded.tag}, step {loaded.step}", dataclasses.asdict(config),
             {name: f"{value:.2%}" for name, value in results.items()}],
            stage=f"chat_eval_{config.source}", results=results,
        )


if __name__ == "__main__":
    cli.run(main, ChatEvalConfig, prog="scripts.chat_eval", description=__doc__.splitlines()[0])

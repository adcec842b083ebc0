"""Evaluation of a chat model on tasks, and its section of the report."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import jax

from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import count, flag
from nanochat_jax.devices import EngineFlags, Processes, start
from nanochat_jax.eval.chat import (
    Generator,
    Sampling,
    accuracy,
    chatcore,
    evaluate_task,
    own_key,
    write_problems,
)
from nanochat_jax.files import make_directory
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.sharding import data_size, make_mesh
from nanochat_jax.paths import Paths
from nanochat_jax.report import sections
from nanochat_jax.tasks import eval_tasks_for, is_reserved, load_eval_task, task_names
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.custom_json import CustomJSON

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChatEvalConfig(EngineFlags, Processes):
    task_name: str | None = flag(
        None,
        "tasks joined by |; default those that fit the model's corpus",
        short="-a",
        check=task_names,
    )
    task_file: str | None = flag(
        None, "evaluate this JSON Lines file instead: conversations, or questions with choices"
    )
    temperature: float = flag(
        0.0, "sampling temperature; 0 is greedy", short="-t", at_least=0, at_most=100
    )
    max_new_tokens: int = count(512, "longest reply in tokens", short="-m", at_most=2**24)
    num_samples: int = count(
        1, "replies per problem; one correct reply passes", short="-n", at_most=10**6
    )
    top_k: int = flag(
        50, "sample among the k likeliest tokens; 0: all", short="-k", at_least=0, at_most=10**6
    )
    batch_size: int = count(
        32,
        "replies in parallel per device, and multiple-choice prompts of a batch",
        short="-b",
        at_most=10**6,
    )
    max_problems: int | None = count(None, "problems of each task; default all", short="-x")

    def __post_init__(self) -> None:
        if self.task_name and self.task_file:
            raise ValueError("`task_name` and `task_file` are alternatives: choose one")


def evaluate_chat(config: ChatEvalConfig) -> None:
    """Evaluate the model on all tasks; write every problem's result and a section of the report."""
    paths = Paths.from_env()
    start(paths, config)
    mesh = make_mesh(config.mesh)
    # Load all tasks first, named ones before the model, so that a missing task is reported
    # immediately.
    tasks: list[Task] = []
    if config.task_file:
        tasks = [CustomJSON(Path(config.task_file))]
    elif config.task_name:
        tasks = [load_eval_task(name, paths) for name in task_names(config.task_name)]
    loaded = load_model(paths, config.source, tag=config.model_tag, step=config.step, mesh=mesh)
    tasks = tasks or [load_eval_task(name, paths) for name in eval_tasks_for(loaded.meta["data"])]
    tasks = [task.view(stop=config.max_problems) for task in tasks]
    make_directory(paths.report)

    generator = Generator(
        config=loaded.config,
        params=loaded.params,
        tokenizer=loaded.tokenizer,
        num_slots=config.batch_size * data_size(mesh),
        compute=Compute.on(mesh, dtype=config.dtype, cache_dtype=config.cache_dtype),
    )
    sampling = Sampling(
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
    )
    directory = paths.logs(config.source) / loaded.tag
    if config.task_file and jax.process_index() == 0:
        key = tasks[0].key
        tasks[0].key = own_key(key, Path(config.task_file), directory, reserved=is_reserved(key))
    results: dict[str, float] = {}
    for task in tasks:
        problems = evaluate_task(task, generator, sampling)
        results[task.key] = accuracy(problems)
        if jax.process_index() == 0:
            write_problems(directory / f"chat_eval_{task.key}.jsonl", problems)
    results |= chatcore(results, {task.key: task.baseline for task in tasks})
    for name, value in results.items():
        log.info("%-20s %6.2f%%", name, 100 * value)
    if jax.process_index() == 0:
        _log_results(config, paths, f"{loaded.tag}, step {loaded.step}", results)


def _log_results(
    config: ChatEvalConfig, paths: Paths, model: str, results: dict[str, float]
) -> None:
    """Write the section of the report, merged with earlier results of the same model."""
    section = f"Chat evaluation {config.source}"
    with sections.earlier_evaluation(paths.report, section, model) as earlier:
        before = earlier.results if earlier else {}
        kept = [name for name in before if name not in results]
        merged = before | results
        note = f"Results of earlier evaluations, with their own settings: {', '.join(kept)}"
        sections.log_section(
            paths.report,
            section,
            [
                f"Model: {model}",
                dataclasses.asdict(config),
                {name: f"{value:.2%}" for name, value in merged.items()},
                note if kept else None,
            ],
            stage=f"chat_eval_{config.source}",
            results=merged,
            model=model,
        )

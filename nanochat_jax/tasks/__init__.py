"""Tasks: conversations for training and evaluation. One file per data set; registered here."""

from collections.abc import Callable
from typing import Literal

from nanochat_jax.errors import UsageError
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.arc import ARC
from nanochat_jax.tasks.base import Task, TaskMixture
from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.humaneval import HumanEval
from nanochat_jax.tasks.identity import Identity
from nanochat_jax.tasks.mixtures import mixture_for, offline_mixture, upstream_mixture
from nanochat_jax.tasks.mmlu import MMLU
from nanochat_jax.tasks.skills import Arithmetic, LetterCount, Spelling, WordArithmetic, load_words
from nanochat_jax.tasks.spelling import SpellingBee, load_words_alpha

__all__ = [
    "EVAL_TASKS",
    "Task",
    "TaskMixture",
    "eval_task_name",
    "eval_tasks_for",
    "is_reserved",
    "load_eval_task",
    "mixture_for",
    "offline_mixture",
    "task_names",
    "upstream_mixture",
]

UPSTREAM_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
OFFLINE_TASKS = ("Arithmetic", "Spelling", "LetterCount", "Identity", "WordArithmetic")
EVAL_TASKS = UPSTREAM_TASKS + OFFLINE_TASKS

SYNTHETIC_SIZES = {"train": 100_000, "test": 256}  # examples of a generated task


def eval_tasks_for(data: str | None) -> list[str]:
    """Names of the evaluation tasks for a model trained on the corpus `data`."""
    return list(OFFLINE_TASKS if data == "embedded" else UPSTREAM_TASKS)


def eval_task_name(name: str) -> str:
    """The name in `EVAL_TASKS` of a task given by its name or its key (`arc_easy`)."""
    found = next((each for each in EVAL_TASKS if _plain(each) == _plain(name)), None)
    if found is None:
        raise UsageError(f"unknown task {name!r}: expected one of {', '.join(EVAL_TASKS)}")
    return found


def task_names(text: str) -> list[str]:
    """The tasks in "GSM8K|SpellingBee"; empty for "auto". Raises `UsageError` for unknown names."""
    return [] if text == "auto" else [eval_task_name(name) for name in text.split("|")]


def is_reserved(key: str) -> bool:
    """Whether `key` names the results of a task in `EVAL_TASKS` or of a mean over them."""
    return _plain(key) in {"chatcore5", "chatcore6", *map(_plain, EVAL_TASKS)}


def load_eval_task(name: str, paths: Paths, split: Literal["train", "test"] = "test") -> Task:
    """A task of `EVAL_TASKS`, by its name or its key (`arc_easy`).

    Raises `UsageError` for an unknown name and `NotFound` if its data is not available.
    """
    size = SYNTHETIC_SIZES[split]
    loaders: dict[str, Callable[[], Task]] = {
        "ARC-Easy": lambda: ARC(paths, "ARC-Easy", split),
        "ARC-Challenge": lambda: ARC(paths, "ARC-Challenge", split),
        "MMLU": lambda: MMLU(paths, split),
        "GSM8K": lambda: GSM8K(paths, split),
        "HumanEval": lambda: HumanEval(paths),
        "SpellingBee": lambda: SpellingBee(load_words_alpha(paths.base), split, size=size),
        "Arithmetic": lambda: Arithmetic(split, size),
        "WordArithmetic": lambda: WordArithmetic(split, size),
        "Spelling": lambda: Spelling(split, size, load_words(paths.data("embedded"))),
        "LetterCount": lambda: LetterCount(split, size, load_words(paths.data("embedded"))),
        "Identity": lambda: Identity(split, size),
    }
    name = eval_task_name(name)
    if name == "HumanEval" and split != "test":
        raise UsageError(f"HumanEval has only the split test, not {split!r}")
    return loaders[name]()


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")

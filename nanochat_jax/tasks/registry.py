"""The table of all tasks: add a task here, and evaluation, RL and mixtures know it by its name."""

from collections.abc import Callable
from dataclasses import dataclass

from nanochat_jax.errors import UsageError
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.arc import ARC
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.chitchat import ChitChat
from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.humaneval import HumanEval
from nanochat_jax.tasks.identity import Identity, identity_conversations
from nanochat_jax.tasks.mmlu import MMLU
from nanochat_jax.tasks.skills import (
    Arithmetic,
    LetterCount,
    Spelling,
    Split,
    WordArithmetic,
    load_words,
)
from nanochat_jax.tasks.smoltalk import SmolTalk
from nanochat_jax.tasks.spelling import SimpleSpelling, SpellingBee, load_words_alpha

EVAL_SIZES: dict[Split, int] = {"train": 100_000, "test": 256}  # of generated tasks

Load = Callable[[Paths, Split], Task]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a task is used, and how it is loaded there. None: not used."""

    # for evaluation and reinforcement learning, with a `key` and an `eval_type`
    evaluate: Load | None = None
    mix: Load | None = None
    # evaluated by default for models of the embedded corpus, otherwise for the others
    offline: bool = False


def _arc(subset: str) -> Load:
    return lambda paths, split: ARC(paths, subset, split)


def _spelling_bee(size: Callable[[Split], int]) -> Load:
    return lambda paths, split: SpellingBee(load_words_alpha(paths.base), split, size=size(split))


def _embedded_words(paths: Paths) -> list[str]:
    return load_words(paths.data("embedded"))


TASKS: dict[str, Entry] = {
    "SmolTalk": Entry(mix=SmolTalk),
    "ARC-Easy": Entry(evaluate=_arc("ARC-Easy"), mix=_arc("ARC-Easy")),
    "ARC-Challenge": Entry(evaluate=_arc("ARC-Challenge"), mix=_arc("ARC-Challenge")),
    "MMLU": Entry(
        evaluate=MMLU,
        mix=lambda paths, split: MMLU(paths, "auxiliary_train" if split == "train" else split),
    ),
    "GSM8K": Entry(evaluate=GSM8K, mix=GSM8K),
    "HumanEval": Entry(evaluate=HumanEval),
    "SpellingBee": Entry(
        evaluate=_spelling_bee(EVAL_SIZES.__getitem__), mix=_spelling_bee(lambda split: 80_000)
    ),
    "SimpleSpelling": Entry(
        mix=lambda paths, split: SimpleSpelling(load_words_alpha(paths.base), split, size=200_000)
    ),
    "ChitChat": Entry(mix=lambda paths, split: ChitChat(split)),
    "Arithmetic": Entry(
        evaluate=lambda paths, split: Arithmetic(split, EVAL_SIZES[split]), offline=True
    ),
    "Spelling": Entry(
        evaluate=lambda paths, split: Spelling(split, EVAL_SIZES[split], _embedded_words(paths)),
        offline=True,
    ),
    "LetterCount": Entry(
        evaluate=lambda paths, split: LetterCount(split, EVAL_SIZES[split], _embedded_words(paths)),
        offline=True,
    ),
    "Identity": Entry(
        evaluate=lambda paths, split: Identity(split, EVAL_SIZES[split]),
        mix=lambda paths, split: identity_conversations(paths.base),
        offline=True,
    ),
    "WordArithmetic": Entry(
        evaluate=lambda paths, split: WordArithmetic(split, EVAL_SIZES[split]), offline=True
    ),
}
EVAL_TASKS = {name: entry.evaluate for name, entry in TASKS.items() if entry.evaluate}
MIXED = {name: entry.mix for name, entry in TASKS.items() if entry.mix}


def eval_tasks_for(data: str | None) -> list[str]:
    """Names of the evaluation tasks for a model trained on the corpus `data`."""
    return [name for name in EVAL_TASKS if TASKS[name].offline == (data == "embedded")]


def eval_task_name(name: str) -> str:
    """The name in `EVAL_TASKS` of a task given by its name or its key (`arc_easy`)."""
    for task in EVAL_TASKS:
        if _plain(task) == _plain(name):
            return task
    raise UsageError(f"unknown task {name!r}: expected one of {', '.join(EVAL_TASKS)}")


def task_names(text: str) -> list[str]:
    """The tasks in "GSM8K|SpellingBee"; empty for "auto". Raises `UsageError` for unknown names."""
    return [] if text == "auto" else [eval_task_name(name) for name in text.split("|")]


def is_reserved(key: str) -> bool:
    """Whether `key` names the results of a task in `EVAL_TASKS` or of a mean over them."""
    return _plain(key) in {"chatcore5", "chatcore6", *map(_plain, EVAL_TASKS)}


def load_eval_task(name: str, paths: Paths, split: Split = "test") -> Task:
    """A task of `EVAL_TASKS`, by its name or its key (`arc_easy`).

    Raises `UsageError` for an unknown name and `NotFound` if its data is not available.
    """
    return EVAL_TASKS[eval_task_name(name)](paths, split)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")

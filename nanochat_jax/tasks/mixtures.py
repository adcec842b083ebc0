"""Training mixtures of the chat stages: upstream's, an offline one, and user-defined ones."""

import logging
import random
import re
from collections.abc import Mapping
from os.path import samefile
from pathlib import Path
from typing import Literal, NamedTuple

from nanochat_jax.data.convert import file_format
from nanochat_jax.errors import UsageError
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.base import Conversation, Task, TaskMixture
from nanochat_jax.tasks.chitchat import ChitChat
from nanochat_jax.tasks.custom_json import CustomJSON
from nanochat_jax.tasks.identity import Identity
from nanochat_jax.tasks.registry import MIXED
from nanochat_jax.tasks.skills import Arithmetic, LetterCount, Spelling, load_words

logger = logging.getLogger(__name__)

Stage = Literal["mid", "sft"]
Split = Literal["train", "val"]
TASK_SPLITS: dict[Split, Literal["train", "test"]] = {"train": "train", "val": "test"}

# Conversations of each generated skill in one pass; small talk is used once.
OFFLINE_SIZES = {
    "mid": {"arithmetic": 7_000, "spelling": 24_000, "letter_count": 6_000, "identity": 1_000},
    "sft": {"arithmetic": 2_000, "spelling": 6_000, "letter_count": 2_000, "identity": 1_000},
}
OFFLINE_VAL_SIZE = 200  # of each generated skill


class Chained(Task):
    """One to three consecutive conversations of a task joined to one, for multi-turn chats."""

    def __init__(self, task: Task) -> None:
        self.task, self.starts = task, []
        rng, start = random.Random(42), 0
        while start < len(task):
            self.starts.append(start)
            start += rng.choice((1, 1, 2, 3))

    def num_examples(self) -> int:
        return len(self.starts)

    def get_example(self, index: int) -> Conversation:
        end = self.starts[index + 1] if index + 1 < len(self.starts) else len(self.task)
        parts = [self.task[i]["messages"] for i in range(self.starts[index], end)]
        return {"messages": [message for messages in parts for message in messages]}


def offline_mixture(stage: Stage, split: Split, paths: Paths) -> Task:
    """Small talk, arithmetic, spelling, letter counting and identity chats, without a network."""
    sizes, part = OFFLINE_SIZES[stage], TASK_SPLITS[split]
    if split == "val":
        sizes = dict.fromkeys(sizes, OFFLINE_VAL_SIZE)
    words = load_words(paths.data("embedded"))
    return Chained(
        TaskMixture(
            [
                ChitChat(part),
                Arithmetic(part, sizes["arithmetic"]),
                Spelling(part, sizes["spelling"], words),
                LetterCount(part, sizes["letter_count"], words),
                Identity(part, sizes["identity"]),
            ]
        )
    )


def upstream_mixture(
    stage: Stage,
    split: Split,
    paths: Paths,
    *,
    after: str = "mid",
    epochs: Mapping[str, int] | None = None,
) -> TaskMixture:
    """The mixtures of nanochat's speedruns.

    - `mid`: 848K conversations.
    - `sft` after "mid" (December 2025): 22.4K, with 0 passes over MMLU and 1 over GSM8K.
    - `sft` after "base" (2026): with 3 passes over MMLU and 4 over GSM8K.

    `epochs` replaces the passes over MMLU and GSM8K, by name.
    """
    straight = stage == "sft" and after == "base"
    if split == "val":
        full = stage == "mid" or straight
        return named_mixture("SmolTalk,MMLU:5200,GSM8K:420" if full else "SmolTalk", paths, "test")
    if stage == "mid":
        return named_mixture("SmolTalk,MMLU,GSM8K,Identity*2,SimpleSpelling,SpellingBee", paths)
    passes = {"MMLU": 3 if straight else 0, "GSM8K": 4 if straight else 1, **(epochs or {})}
    knowledge = [f"{name}*{count}" for name, count in passes.items() if count > 0]
    if straight:
        parts = ["SmolTalk", *knowledge]
    else:
        parts = ["ARC-Easy", "ARC-Challenge", *knowledge]
        parts += ["SmolTalk:10000", "Identity", "SimpleSpelling:300", "SpellingBee:300"]
    return named_mixture(",".join(parts), paths)


def mixture_for(
    data: str | None,
    stage: Stage,
    split: Split,
    paths: Paths,
    *,
    named: str | None = None,
    after: str = "mid",
    **epochs: int | None,
) -> Task:
    """The mixture of a corpus: offline for `embedded`, else upstream's (also for None).

    `named` replaces the training mixture, not validation. `epochs` are `mmlu_epochs` and
    `gsm8k_epochs`, the passes of upstream's mixture (None: its default).
    """
    passes = {
        name.removesuffix("_epochs").upper(): count
        for name, count in epochs.items()
        if count is not None
    }
    if named and split == "train":
        if passes:
            raise UsageError(
                "`mmlu_epochs` and `gsm8k_epochs`: give the weights in `mixture`, as in MMLU*3"
            )
        return named_mixture(named, paths)
    if data != "embedded":
        return upstream_mixture(stage, split, paths, after=after, epochs=passes)
    if passes:
        raise UsageError(
            "`mmlu_epochs` and `gsm8k_epochs`: the mixture of the embedded corpus has neither"
        )
    return offline_mixture(stage, split, paths)


class MixtureEntry(NamedTuple):
    """An entry of a mixture such as `MMLU*3`: a task or file, "*", ":" or None, and the number."""

    text: str
    name: str
    sign: str | None
    number: float


def mixture_entries(named: str) -> list[MixtureEntry]:
    """The entries of a mixture. Reads no files.

    Raises `UsageError` for an unknown name or an invalid weight.
    """
    entries = []
    for entry in map(str.strip, named.split(",")):
        # A colon that is not followed by a number is part of a path.
        matched = re.fullmatch(r"(?s)(.*?)(?:([*:])((?<=\*)[^*]*|[\d.eE+-]+))?", entry)
        assert matched is not None
        name, sign, number = matched.groups()
        try:
            weight = float(number) if sign else 1.0
            if not 0 < weight < 1e9:
                raise ValueError
        except ValueError:
            raise UsageError(
                f"the weight of {entry!r} must be a positive number, as in {name}*2.5"
            ) from None
        if file_format(name) != "jsonl" and name not in MIXED:
            raise UsageError(
                f"unknown task {name!r}: expected {', '.join(MIXED)} or a file FILE.jsonl"
            )
        entries.append(MixtureEntry(entry, name, sign, weight))
    return entries


def named_mixture(
    named: str, paths: Paths, split: Literal["train", "test"] = "train"
) -> TaskMixture:
    """The mixture described by, for example, "SmolTalk:10000,MMLU*3,GSM8K*4,chats.jsonl*0.5".

    Entries are tasks or files of conversations, with a weight (*) or the number of first
    conversations to use (:). Raises `UsageError` for an unknown name or an invalid weight.
    """
    entries: list[MixtureEntry] = []
    files: dict[str, Task] = {}
    for entry in mixture_entries(named):  # read all files before downloading anything
        if entry.name not in MIXED:
            task = CustomJSON(Path(entry.name), judged=False)
            if same := [other for other in files if samefile(other, entry.name)]:
                logger.warning(
                    "%s: the file is %s again and is read once; to train on it twice, write %s*2",
                    entry.text,
                    same[0],
                    same[0],
                )
                continue
            files[entry.name] = task
        entries.append(entry)
    tasks: list[Task] = []
    weights = []
    for text, name, sign, number in entries:
        tasks.append(files[name] if name in files else MIXED[name](paths, split))
        size = len(tasks[-1])
        weights.append(min(1.0, number / size) if sign == ":" else number)
        if round(weights[-1] * size) < 1:
            raise UsageError(
                f"{text!r} takes none of the {size} conversations of {name}: give more weight, or "
                "leave it out"
            )
    return TaskMixture(tasks, weights)

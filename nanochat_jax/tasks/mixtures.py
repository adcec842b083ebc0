"""Training mixtures of the chat stages: upstream's, an offline one, and user-defined ones."""

import logging
import random
import re
from collections.abc import Callable
from os.path import samefile
from pathlib import Path
from typing import Literal

from nanochat_jax.data.convert import file_format
from nanochat_jax.errors import UsageError
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.arc import ARC
from nanochat_jax.tasks.base import Conversation, Task, TaskMixture
from nanochat_jax.tasks.chitchat import ChitChat
from nanochat_jax.tasks.custom_json import CustomJSON
from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.identity import Identity, identity_conversations
from nanochat_jax.tasks.mmlu import MMLU
from nanochat_jax.tasks.skills import Arithmetic, LetterCount, Spelling, load_words
from nanochat_jax.tasks.smoltalk import SmolTalk
from nanochat_jax.tasks.spelling import SimpleSpelling, SpellingBee, load_words_alpha

logger = logging.getLogger(__name__)

Stage = Literal["mid", "sft"]
Split = Literal["train", "val"]

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
        return {
            "messages": [
                message
                for i in range(self.starts[index], end)
                for message in self.task[i]["messages"]
            ]
        }


def offline_mixture(stage: Stage, split: Split, paths: Paths) -> Task:
    """Small talk, arithmetic, spelling, letter counting and identity chats, without network access.

    Needs the embedded corpus (for its word list) and the packages of the extra `offline`.
    """
    sizes = (
        OFFLINE_SIZES[stage]
        if split == "train"
        else dict.fromkeys(OFFLINE_SIZES[stage], OFFLINE_VAL_SIZE)
    )
    words = load_words(paths.data("embedded"))
    part: Literal["train", "test"] = "train" if split == "train" else "test"
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
    mmlu_epochs: int | None = None,
    gsm8k_epochs: int | None = None,
) -> TaskMixture:
    """The mixtures of nanochat's speedruns.

    - `mid`: 848K conversations.
    - `sft` after "mid" (December 2025): 22.4K, with 0 passes over MMLU and 1 over GSM8K.
    - `sft` after "base" (2026): with 3 passes over MMLU and 4 over GSM8K.
    """
    straight = stage == "sft" and after == "base"
    if split == "val":
        return named_mixture(
            "SmolTalk,MMLU:5200,GSM8K:420" if stage == "mid" or straight else "SmolTalk",
            paths,
            "test",
        )
    if stage == "mid":
        return named_mixture("SmolTalk,MMLU,GSM8K,Identity*2,SimpleSpelling,SpellingBee", paths)
    mmlu, gsm8k = (3, 4) if straight else (0, 1)
    passes = {
        "MMLU": mmlu if mmlu_epochs is None else mmlu_epochs,
        "GSM8K": gsm8k if gsm8k_epochs is None else gsm8k_epochs,
    }
    knowledge = [f"{name}*{count}" for name, count in passes.items() if count > 0]
    if straight:
        return named_mixture(",".join(["SmolTalk", *knowledge]), paths)
    return named_mixture(
        ",".join(
            [
                "ARC-Easy,ARC-Challenge",
                *knowledge,
                "SmolTalk:10000,Identity,SimpleSpelling:300,SpellingBee:300",
            ]
        ),
        paths,
    )


def mixture_for(
    data: str | None,
    stage: Stage,
    split: Split,
    paths: Paths,
    *,
    named: str | None = None,
    after: str = "mid",
    mmlu_epochs: int | None = None,
    gsm8k_epochs: int | None = None,
) -> Task:
    """The mixture of a corpus: offline for `embedded`, else upstream's (also for None).

    `named` replaces the training mixture, not validation. `mmlu_epochs` and `gsm8k_epochs` change
    the passes of upstream's mixture.
    """
    epochs_given = mmlu_epochs is not None or gsm8k_epochs is not None
    if named and split == "train":
        if epochs_given:
            raise UsageError(
                "--mmlu-epochs and --gsm8k-epochs: give the weights in --mixture, as in MMLU*3"
            )
        return named_mixture(named, paths)
    if data != "embedded":
        return upstream_mixture(
            stage, split, paths, after=after, mmlu_epochs=mmlu_epochs, gsm8k_epochs=gsm8k_epochs
        )
    if epochs_given:
        raise UsageError(
            "--mmlu-epochs and --gsm8k-epochs: the mixture of the embedded corpus has neither"
        )
    return offline_mixture(stage, split, paths)


MIXED_TASKS = (
    "SmolTalk",
    "MMLU",
    "GSM8K",
    "ARC-Easy",
    "ARC-Challenge",
    "Identity",
    "SimpleSpelling",
    "SpellingBee",
    "ChitChat",
)


def mixture_entries(named: str) -> list[tuple[str, str, str | None, float]]:
    """(text, name, sign, number) of each entry of a mixture; the sign is "*", ":" or None.

    Reads no files. Raises `UsageError` for an unknown name or an invalid weight.
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
        if file_format(name) != "jsonl" and name not in MIXED_TASKS:
            raise UsageError(
                f"unknown task {name!r}: expected {', '.join(MIXED_TASKS)} or a file FILE.jsonl"
            )
        entries.append((entry, name, sign, weight))
    return entries


def named_mixture(
    named: str, paths: Paths, split: Literal["train", "test"] = "train"
) -> TaskMixture:
    """The mixture described by, for example, "SmolTalk:10000,MMLU*3,GSM8K*4,chats.jsonl*0.5".

    Entries are tasks or files of conversations, with a weight (*) or the number of first
    conversations to use (:). Raises `UsageError` for an unknown name or an invalid weight.
    """
    tasks: dict[str, Callable[[], Task]] = {
        "SmolTalk": lambda: SmolTalk(paths, split),
        "MMLU": lambda: MMLU(paths, "auxiliary_train" if split == "train" else split),
        "GSM8K": lambda: GSM8K(paths, split),
        "ARC-Easy": lambda: ARC(paths, "ARC-Easy", split),
        "ARC-Challenge": lambda: ARC(paths, "ARC-Challenge", split),
        "Identity": lambda: identity_conversations(paths.base),
        "SimpleSpelling": lambda: SimpleSpelling(load_words_alpha(paths.base), split, size=200_000),
        "SpellingBee": lambda: SpellingBee(load_words_alpha(paths.base), split, size=80_000),
        "ChitChat": lambda: ChitChat(split),
    }
    entries: list[tuple[str, str, str | None, float]] = []
    files: dict[str, Task] = {}
    for parsed in mixture_entries(named):  # read all files before downloading anything
        text, name, *_ = parsed
        if name not in tasks:
            task = CustomJSON(Path(name), judged=False)
            if same := [other for other in files if samefile(other, name)]:
                logger.warning(
                    "%s: the file is %s again and is read once; to train on it twice, write %s*2",
                    text,
                    same[0],
                    same[0],
                )
                continue
            files[name] = task
        entries.append(parsed)
    chosen: list[Task] = []
    weights = []
    for entry, name, sign, weight in entries:
        chosen.append(files[name] if name in files else tasks[name]())
        weights.append(min(1.0, weight / len(chosen[-1])) if sign == ":" else weight)
        if round(weights[-1] * len(chosen[-1])) < 1:
            raise UsageError(
                f"{entry!r} takes none of the {len(chosen[-1])} conversations of {name}: give "
                "more weight, or "
                "leave it out"
            )
    return TaskMixture(chosen, weights)

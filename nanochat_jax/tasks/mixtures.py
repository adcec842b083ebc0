"""What the chat stages train on: upstream's mixtures, and one for machines without a network."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from nanochat_jax.cli import UsageError
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

Stage = Literal["mid", "sft"]

# Conversations of each generated skill in one pass, and passes over the small talk.
OFFLINE_SIZES = {
    "mid": {"chitchat": 1, "arithmetic": 7_000, "spelling": 24_000, "letter_count": 6_000, "identity": 1_000},
    "sft": {"chitchat": 1, "arithmetic": 2_000, "spelling": 6_000, "letter_count": 2_000, "identity": 1_000},
}
OFFLINE_VAL_SIZE = 200  # of each generated skill


class Chained(Task):
    """One to three conversations of a task at a time, one after the other in one: a chat goes on after its first reply."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.starts = task, []
        rng, start = random.Random(42), 0
        while start < len(task):
            self.starts.append(start)
            start += rng.choice((1, 1, 2, 3))

    def num_examples(self) -> int:
        return len(self.starts)

    def get_example(self, index: int) -> Conversation:
        end = self.starts[index + 1] if index + 1 < len(self.starts) else len(self.task)
        return {"messages": [message for i in range(self.starts[index], end) for message in self.task[i]["messages"]]}


def offline_mixture(stage: Stage, split: Literal["train", "val"], paths: Paths) -> Task:
    """Small talk, arithmetic, spelling, letter counting and chats about the assistant, without a network.

    Needs the embedded corpus (for its word list) and the packages of the extra `offline`.
    """
    sizes = OFFLINE_SIZES[stage]
    words = load_words(paths.data("embedded"))
    if split == "val":
        sizes = {name: 1 if name == "chitchat" else OFFLINE_VAL_SIZE for name in sizes}
    part = _skill_split(split)
    return Chained(TaskMixture([
        *[ChitChat(part)] * sizes["chitchat"],
        Arithmetic(part, sizes["arithmetic"]),
        Spelling(part, sizes["spelling"], words),
        LetterCount(part, sizes["letter_count"], words),
        Identity(part, sizes["identity"]),
    ]))  # fmt: skip


def upstream_mixture(stage: Stage, split: Literal["train", "val"], paths: Paths, mmlu_epochs: int = 0,
                     gsm8k_epochs: int = 1) -> TaskMixture:
    """The mixtures of nanochat's speedrun of December 2025: 848K conversations of `mid`, 22.4K of `sft`.

    The passes over MMLU and GSM8K are those of `sft`.
    """
    tasks: list[Task]
    _skill_split(split)
    if split == "val" and stage == "sft":
        tasks = [SmolTalk(paths, "test")]
    elif split == "val":
        tasks = [SmolTalk(paths, "test"), MMLU(paths, "test", stop=5200), GSM8K(paths, "test", stop=420)]
    elif stage == "mid":
        words, identity = load_words_alpha(paths.base), identity_conversations(paths.base)
        tasks = [
            SmolTalk(paths, "train"),
            MMLU(paths, "auxiliary_train"),
            GSM8K(paths, "train"),
            identity, identity,
            SimpleSpelling(words, "train", size=200_000),
            SpellingBee(words, "train", size=80_000),
        ]  # fmt: skip
    else:
        words = load_words_alpha(paths.base)
        tasks = [
            ARC(paths, "ARC-Easy", "train"),
            ARC(paths, "ARC-Challenge", "train"),
            *[MMLU(paths, "auxiliary_train")] * mmlu_epochs,
            *[GSM8K(paths, "train")] * gsm8k_epochs,
            SmolTalk(paths, "train", stop=10_000),
            identity_conversations(paths.base),
            SimpleSpelling(words, "train", size=300),
            SpellingBee(words, "train", size=300),
        ]
    return TaskMixture(tasks)


def mixture_for(data: str | None, stage: Stage, split: Literal["train", "val"], paths: Paths, *,
                named: str | None = None, after: str = "mid", mmlu_epochs: int | None = None,
                gsm8k_epochs: int | None = None) -> Task:
    """The mixture that goes with a corpus: `embedded`, or upstream's (also where imported weights name none).

    If a mixture is `named`, it is what is trained on; validation stays the same.
    SFT after "base" has upstream's of 2026, all of SmolTalk with 3 passes over MMLU and 4 over GSM8K; after "mid" its of
    2025, with none over MMLU and 1 over GSM8K. `mmlu_epochs` and `gsm8k_epochs` change these numbers.
    """
    if named and split == "train":
        if mmlu_epochs is not None or gsm8k_epochs is not None:
            raise UsageError("--mmlu-epochs and --gsm8k-epochs: give the weights in --mixture, as in MMLU*3")
        return named_mixture(named, paths)
    if data == "embedded":
        if mmlu_epochs is not None or gsm8k_epochs is not None:
            raise UsageError("--mmlu-epochs and --gsm8k-epochs: the mixture of the embedded corpus has neither")
        return offline_mixture(stage, split, paths)
    if after == "base" and stage == "sft":
        if split == "val":
            return upstream_mixture("mid", "val", paths)
        mmlu, gsm8k = (given if given is not None else usual for given, usual in ((mmlu_epochs, 3), (gsm8k_epochs, 4)))
        return TaskMixture([SmolTalk(paths, "train"), *[MMLU(paths, "auxiliary_train")] * mmlu,
                            *[GSM8K(paths, "train")] * gsm8k])
    return upstream_mixture(stage, split, paths, mmlu_epochs or 0, 1 if gsm8k_epochs is None else gsm8k_epochs)


def named_mixture(named: str, paths: Paths) -> TaskMixture:
    """The mixture "SmolTalk,MMLU*3,GSM8K*4,chats.jsonl*0.5": tasks or files of conversations, each with its weight.

    (Those three tasks are upstream's SFT since January 2026.) Raises `UsageError` for a name or weight that is none.
    """

    def words() -> list[str]:
        return load_words_alpha(paths.base)

    tasks: dict[str, Callable[[], Task]] = {
        "SmolTalk": lambda: SmolTalk(paths, "train"),
        "MMLU": lambda: MMLU(paths, "auxiliary_train"),
        "GSM8K": lambda: GSM8K(paths, "train"),
        "ARC-Easy": lambda: ARC(paths, "ARC-Easy", "train"),
        "ARC-Challenge": lambda: ARC(paths, "ARC-Challenge", "train"),
        "Identity": lambda: identity_conversations(paths.base),
        "SimpleSpelling": lambda: SimpleSpelling(words(), "train", size=200_000),
        "SpellingBee": lambda: SpellingBee(words(), "train", size=80_000),
        "ChitChat": lambda: ChitChat("train"),
    }
    chosen, weights = [], []
    for entry in named.split(","):
        name, star, weight = entry.strip().partition("*")
        try:
            weights.append(float(weight) if star else 1.0)
            if not 0 < weights[-1] < 1e6:
                raise ValueError
        except ValueError:
            raise UsageError(f"the weight of {entry.strip()!r} must be a positive number, as in {name}*2.5") from None
        if name.endswith(".jsonl"):
            chosen.append(CustomJSON(Path(name)))
        elif name in tasks:
            chosen.append(tasks[name]())
        else:
            raise UsageError(f"unknown task {name!r}: expected {', '.join(tasks)} or a file FILE.jsonl")
    return TaskMixture(chosen, weights)


def _skill_split(split: str) -> Literal["train", "test"]:
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, got {split!r}")
    return "test" if split == "val" else "train"

"""Human small talk from the package `chitchat-dataset` (BYU Chit-Chat Challenge, 2018, MIT).

Its JSON file is read without importing the package. Only the opening of a conversation is used. If
it contains rude words, contact details, places, ages or account names, the conversation is dropped.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanochat_jax.data.embedded import package_dir
from nanochat_jax.errors import explaining
from nanochat_jax.files import parse_json
from nanochat_jax.tasks.base import Conversation, Task, assistant, user
from nanochat_jax.tasks.skills import Split, split_of

MIN_TURNS, MAX_TURNS = 4, 8
MAX_TURN_CHARACTERS = 220

# Stems: each matches the words that start with it.
RUDE = re.compile(
    r"\b(?:fuck|f\*|wtf|shit|bullshit|bitch|bastard|cunt|dick|cock|puss[yi]|ass\b|asses\b|asshole"
    r"|dumbass|badass|arse|damn|goddam|crap|piss|poop|pee\b|fart|slut|whor|hooker|prostitut"
    r"|stripper|fag|homo\b|dyke|tranny|nigg|negro|chink|retard|moron|idiot|stupid|dumb|loser|rape"
    r"|rapi|molest|sex|porn|nude|naked|horny|boob|tits?\b|penis|vagina|erect|orgasm|condom|virgin"
    r"|suicid|kill|murder|hitler|nazi|terroris|cocaine|heroin|meth\b|weed\b|drunk|stoned|hell\b"
    r"|jesus\b|omg|shut up|hate you|ugly|creep|gay\b|lesbian|butt\b|sucks?\b)",
    re.IGNORECASE,
)
PRIVATE = re.compile(
    # links, handles, years, phone numbers
    r"https?:|www\.|\w\.(?:com|org|net|edu|gov|io)\b|@|\d{4}|\d[\d .()-]{6,}\d"
    r"|\b(?:snap ?chat|insta(?:gram)?|face ?book|twitter|venmo|slack|discord|user ?name|e-?mail"
    r"|phone|address|number)\b"
    r"|\bname'?s?\b|\b(?:i am|i'm|im|this is) (?-i:[A-Z])|\b(?:years?|yrs?) old\b|\bbirthday\b"
    r"|\bturn(?:ed|ing)? \d"
    r"|\b(?:byu|uvu|provo|orem|utah|salt lake|idaho|rexburg|mormon|lds|mission|missionary|bishop"
    r"|stake|professor)\b"
    r"|\b(?:from|live in|lives in|lived in|born in|grew up in) (?-i:[A-Z])",
    re.IGNORECASE,
)
# the contest itself, and the connection between the partners
ABOUT_THE_SITE = re.compile(
    r"\b(?:chit ?chat|leader ?board|disconnect|reconnect|connection|ratings?|rated|points|prompt"
    r"|extra credit|survey|bots?|glitch|anybody|anyone (?:here|there)|are you (?:still )?there"
    r"|you there|chatting|challenge)\b",
    re.IGNORECASE,
)
NOISE = re.compile(r"(.)\1{3,}|(?:ha){4,}|[^ -~]|[\\^_|~<>{}\[\]=+*#/]|[A-Z]{6,}", re.DOTALL)


def tidy(utterances: Iterable[str]) -> str:
    """One turn from a person's consecutive messages: sentences with a capital and a full stop."""
    turn = ""
    for utterance in utterances:
        utterance = " ".join(utterance.split())
        if not re.search(r"\w", utterance):
            turn += utterance  # a separate "?" belongs to the message before
            continue
        if turn:
            turn += " " if turn[-1] in ".!?,:;" else ". "
        turn += utterance[0].upper() + utterance[1:]
    turn = re.sub(r"\bi\b(?=['\s]|$)", "I", turn)
    turn = re.sub(r"\b([Ii])m\b", "I'm", turn)
    return turn if not turn or turn[-1] in ".!?" else turn + "."


def clean(turns: Iterable[Iterable[str]]) -> list[str] | None:
    """The opening of a conversation: an even number of turns, 4 to 8. None if it is not usable."""
    tidied: list[str] = []
    for turn in turns:
        turn = tidy(turn)
        if (
            len(tidied) == MAX_TURNS
            or len(turn) > MAX_TURN_CHARACTERS
            or not re.search("[a-z]", turn)
        ):
            break
        tidied.append(turn)
    tidied = tidied[: len(tidied) // 2 * 2]
    opening = "\n".join(tidied)
    if len(tidied) < MIN_TURNS or any(
        bad.search(opening) for bad in (RUDE, PRIVATE, ABOUT_THE_SITE)
    ):
        return None
    return None if any(NOISE.search(turn) for turn in tidied) else tidied


def _reduce(value: dict[str, Any]) -> Any:
    """Reduce each parsed object. Otherwise, 40 MB of text would be 500 MB of dicts."""
    if "text" in value:  # a message
        return value["text"]
    return clean(value["messages"]) if "messages" in value else value


@functools.lru_cache(maxsize=1)
def load_conversations(path: Path) -> tuple[tuple[str, ...], ...]:
    """All usable conversations, in the file's order, without duplicates."""
    what, advice = f"{path} is damaged", "reinstall the package chitchat-dataset"
    with explaining(what, advice):
        cleaned = parse_json(path.read_bytes(), object_hook=_reduce).values()
    return tuple(dict.fromkeys(tuple(turns) for turns in cleaned if turns))


class ChitChat(Task):
    """Small talk between two people, the first as the user. A tenth is the test split."""

    def __init__(self, split: Split) -> None:
        conversations = load_conversations(
            package_dir("chitchat_dataset", "chitchat-dataset") / "dataset.json"
        )
        self.conversations = [
            turns for turns in conversations if split_of("\n".join(turns)) == split
        ]

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        roles = (user, assistant)
        return {
            "messages": [roles[i % 2](turn) for i, turn in enumerate(self.conversations[index])]
        }

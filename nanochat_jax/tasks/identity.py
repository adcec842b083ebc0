"""Chats about the assistant's identity: generated from templates, or upstream's file of 1,000."""

import random
from pathlib import Path

from nanochat_jax.files import fetch_file
from nanochat_jax.tasks.base import PHRASES, Conversation, assistant, user
from nanochat_jax.tasks.custom_json import CustomJSON
from nanochat_jax.tasks.skills import Skill, split_of

CONVERSATIONS_URL = (
    "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"
)

ABOUT = list(PHRASES["identity"].values())  # every reply names the assistant
OPENERS = PHRASES["openers"]


class Identity(Skill):
    """Short chats about the assistant.

    Each combination of opening words and question belongs to one split. Questions without opening
    words are only in training. Test conversations end in a question about the assistant; training
    also has greetings, thanks and farewells.
    """

    key = "identity"

    def make(self, rng: random.Random) -> Conversation:
        while True:
            opener = rng.choice(OPENERS)
            topic = rng.choice(ABOUT)
            question = rng.choice(topic["questions"])
            if (split_of(opener + question) if opener else "train") == self.split:
                break
        asked = opener + (question[0].lower() + question[1:] if opener.endswith(", ") else question)
        if rng.random() < 0.2:
            asked = asked.lower().rstrip("?.")
        exchange = [user(asked), assistant(rng.choice(topic["replies"]))]
        if self.split == "train":
            exchange = self.surround(exchange, rng)
        return {"messages": exchange}

    @staticmethod
    def surround(exchange: list, rng: random.Random) -> list:
        """Randomly add a greeting, thanks or farewell, or return only a greeting."""

        def turn(kind: str) -> list:
            phrases = PHRASES["small_talk"][kind]
            ending = rng.choice(["", "", "!", "."])
            message = rng.choice(phrases["messages"])
            message += "" if message.endswith("?") else ending
            message = message.lower() if rng.random() < 0.2 else message
            return [user(message), assistant(rng.choice(phrases["replies"]))]

        form = rng.random()
        if form < 0.15:
            return turn("greetings")
        if form < 0.30:
            return turn("greetings") + exchange
        if form < 0.40:
            return exchange + turn("thanks")
        if form < 0.45:
            return exchange + turn("farewells")
        return exchange

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the reply contains "nanochat"."""
        return "nanochat" in completion.lower()


def identity_conversations(base: Path) -> CustomJSON:
    """Upstream's synthetic chats about nanochat, downloaded to the base directory if missing."""
    return CustomJSON(
        fetch_file(CONVERSATIONS_URL, base / "identity_conversations.jsonl"), judged=False
    )

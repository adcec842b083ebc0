"""Chats about the assistant's identity: generated from templates, or upstream's file of 1,000."""

import random
from pathlib import Path

from nanochat_jax.files import fetch_file
from nanochat_jax.tasks.base import Conversation, assistant, lines, user
from nanochat_jax.tasks.custom_json import CustomJSON
from nanochat_jax.tasks.skills import Skill, split_of

CONVERSATIONS_URL = (
    "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"
)

# Topic -> (questions, replies). Every reply names the assistant, which `evaluate` checks.
ABOUT = {
    "name": (
        lines("""
Who are you?
What are you?
What is your name?
What's your name?
Tell me about yourself.
Introduce yourself.
Who am I talking to?
What should I call you?
Do you have a name?
Can you introduce yourself?
Who is this?
What model are you?
"""),
        lines("""
I am nanochat_jax, a small language model trained from scratch in JAX.
My name is nanochat_jax. I am a small language model, trained from scratch in JAX.
"""),
    ),
    "kind": (
        lines("""
Are you a human?
Are you a robot?
Are you an AI?
Are you ChatGPT?
Are you a person?
Are you a computer?
Am I talking to a machine?
Are you real?
Are you a bot?
"""),
        lines("""
I am nanochat_jax, a small language model: a computer program, not a person.
I am a program called nanochat_jax, a small language model trained in JAX.
"""),
    ),
    "maker": (
        lines("""
Who made you?
Who created you?
Who built you?
Who trained you?
Where do you come from?
Where are you from?
Who is your creator?
Which company made you?
How were you made?
"""),
        lines("""
I was made with nanochat_jax, an open project that trains a chat model from scratch in JAX.
I come from nanochat_jax, an open project to train a small chat model from scratch.
"""),
    ),
    "skills": (
        lines("""
What can you do?
How can you help me?
What are you good at?
What are your skills?
Can you help me?
What do you know?
What can I ask you?
What can you help me with?
Are you smart?
"""),
        lines("""
I am nanochat_jax. I can chat a little, calculate, spell words and count letters.
I am nanochat_jax. I am small: I chat, do arithmetic with a calculator, spell words \
and count letters.
"""),
    ),
    "training": (
        lines("""
How do you work?
How were you trained?
How big are you?
What are you made of?
How did you learn to talk?
What is your architecture?
What is nanochat_jax?
How does your brain work?
"""),
        lines("""
nanochat_jax is a small Transformer: it read old speeches, then practiced on short conversations.
I am nanochat_jax, a small Transformer written in JAX. I learned from text, one token at a time.
"""),
    ),
}
GREETINGS = lines("""
Hi
Hello
Hey
Hi there
Hello there
Good morning
Good evening
Hi, how are you?
""")
GREETING_REPLIES = ["Hello! How can I help you?", "Hi! I am nanochat_jax. How can I help you?"]
THANKS = ["Thanks", "Thank you", "Thanks a lot", "Thank you very much", "Great, thanks"]
THANKS_REPLIES = ["You're welcome!", "You're welcome! Ask me anything else."]
FAREWELLS = ["Bye", "Goodbye", "See you later", "Good night"]
FAREWELL_REPLIES = ["Goodbye!", "Goodbye! Have a nice day."]
OPENERS = ["", "", "", "Hi! ", "Hello. ", "Hey, ", "Hello! ", "Please tell me: "]
OPENERS += ["I have a question. ", "So, ", "Okay. ", "By the way, "]


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
            questions, replies = ABOUT[rng.choice(list(ABOUT))]
            question = rng.choice(questions)
            if (split_of(opener + question) if opener else "train") == self.split:
                break
        asked = opener + (question[0].lower() + question[1:] if opener.endswith(", ") else question)
        if rng.random() < 0.2:
            asked = asked.lower().rstrip("?.")
        exchange = [user(asked), assistant(rng.choice(replies))]
        if self.split == "train":
            exchange = self.surround(exchange, rng)
        return {"messages": exchange}

    @staticmethod
    def surround(exchange: list, rng: random.Random) -> list:
        """Randomly add a greeting, thanks or farewell, or return only a greeting."""

        def turn(messages: list[str], replies: list[str]) -> list:
            ending = rng.choice(["", "", "!", "."])
            message = rng.choice(messages)
            message += "" if message.endswith("?") else ending
            message = message.lower() if rng.random() < 0.2 else message
            return [user(message), assistant(rng.choice(replies))]

        form = rng.random()
        if form < 0.15:
            return turn(GREETINGS, GREETING_REPLIES)
        if form < 0.30:
            return turn(GREETINGS, GREETING_REPLIES) + exchange
        if form < 0.40:
            return exchange + turn(THANKS, THANKS_REPLIES)
        if form < 0.45:
            return exchange + turn(FAREWELLS, FAREWELL_REPLIES)
        return exchange

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the reply contains "nanochat"."""
        return "nanochat" in completion.lower()


def identity_conversations(base: Path) -> CustomJSON:
    """Upstream's synthetic chats about nanochat, downloaded to the base directory if missing."""
    return CustomJSON(
        fetch_file(CONVERSATIONS_URL, base / "identity_conversations.jsonl"), judged=False
    )

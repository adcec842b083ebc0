"""Generated tasks: arithmetic and letter counting with the calculator, and spelling.

Conversation i of a split is a function of (split, i). The item asked about (numbers and operation,
or word) belongs to one split by its hash, so test items are never trained on.

Tool calls are made easy to copy. The tokenizer merges the character before a word into the word's
first token. So a call repeats the word together with that character (a quotation mark or a space)
and copies tokens, not letters.
"""

import hashlib
import operator
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nanochat_jax.errors import NotFound
from nanochat_jax.tasks.base import (
    PHRASES,
    Conversation,
    Task,
    assistant,
    python,
    python_output,
    text,
    user,
)

Split = Literal["train", "test"]

TEST_SHARE = 10  # one item in this many is in the test split
MADE_UP_SHARE, LONGEST_MADE_UP = 0.3, 12  # of training words; maximum letters
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SPOKEN = {"+": ["plus"], "-": ["minus"], "*": ["times", "multiplied by", "x"], "/": ["divided by"]}


def split_of(item: str) -> Split:
    """The split of an item, by a hash that is the same in every process."""
    digest = hashlib.blake2b(item.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest) % TEST_SHARE == 0 else "train"


def final_number(completion: str) -> float | None:
    """The last number in the text."""
    numbers = NUMBER.findall(completion)
    return float(numbers[-1].replace(",", "")) if numbers else None


def load_words(directory: Path) -> list[str]:
    """The word list written by `data.embedded.build`, most frequent first."""
    path = directory / "words.txt"
    if not path.exists():
        raise NotFound(f"no word list {path}: run `python -m nanochat_jax.dataset embedded` first")
    return path.read_text(encoding="utf-8").split()


class Skill(Task):
    """A generated task: `size` conversations of one split."""

    eval_type: Literal["generative"] | None = "generative"

    def __init__(self, split: Split, size: int) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be train or test, got {split!r}")
        self.split, self.size = split, size

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        # Strings, because Python seeds with the absolute value of integers.
        return self.make(random.Random(f"{self.key}/{self.split}/{index}"))

    def make(self, rng: random.Random) -> Conversation:
        raise NotImplementedError


class Arithmetic(Skill):
    """Two numbers and one of + - * /, answered with the calculator. Divisions have no remainder."""

    key = "arithmetic"

    def make(self, rng: random.Random) -> Conversation:
        while True:
            operation, a, b = self.draw(rng)
            # 2 + 3 and 3 + 2 are one item
            low, high = (a, b) if operation in "-/" else sorted((a, b))
            if split_of(f"{low} {operation} {high}") == self.split:
                break
        expression = f"{a} {operation} {b}"
        question = self.ask(rng, operation, a, b)
        result = OPERATIONS[operation](a, b)
        reply = [python(expression), python_output(str(result)), text(f"{expression} = {result}")]
        return {"messages": [user(question), assistant(reply)], "answer": result}

    def ask(self, rng: random.Random, operation: str, a: int, b: int) -> str:
        form = rng.random()
        if form < 0.70:
            asked = f"{a} {operation} {b}"
        elif form < 0.82:
            asked = f"{a}{operation}{b}"
        else:
            asked = f"{a} {rng.choice(SPOKEN[operation])} {b}"
        return rng.choice(PHRASES["arithmetic"]).format(asked)

    @staticmethod
    def draw(rng: random.Random) -> tuple[str, int, int]:
        operation = rng.choices("+-*/", weights=[4, 3, 2, 1])[0]
        a, b = (
            rng.randrange(10 ** rng.choices([1, 2, 3, 4], weights=[1, 3, 4, 2])[0])
            for _ in range(2)
        )
        if operation == "/":
            b = b % 99 + 1
            a = a % 999 * b
        return operation, a, b

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the last number is the exact result."""
        return final_number(completion) == conversation["answer"]


class WordArithmetic(Arithmetic):
    """Arithmetic in phrasings that no training mixture has, for reinforcement learning."""

    key = "word_arithmetic"

    def ask(self, rng: random.Random, operation: str, a: int, b: int) -> str:
        return rng.choice(PHRASES["word_arithmetic"][operation]).format(a=a, b=b)


class WordSkill(Skill):
    """A skill about one word of a list."""

    def __init__(self, split: Split, size: int, words: Sequence[str]) -> None:
        super().__init__(split, size)
        self.words = [word for word in words if split_of(word) == split]
        if not self.words:
            raise ValueError(f"none of the {len(words)} words given is of the split {split}")

    def draw_word(self, rng: random.Random) -> str:
        """A word of the split."""
        word = rng.choice(self.words)
        if self.split == "train" and rng.random() < MADE_UP_SHARE:
            other = rng.choice(self.words)
            made = word[: rng.randint(1, len(word))] + other[rng.randrange(len(other)) :]
            if len(made) <= LONGEST_MADE_UP and split_of(made) == "train":
                return made
        return word


class Spelling(WordSkill):
    """The letters of a word, one by one."""

    key = "spelling"

    def make(self, rng: random.Random) -> Conversation:
        word = self.draw_word(rng)
        asked = word if rng.random() < 0.5 else f'"{word}"'
        question = rng.choice(PHRASES["spelling"]).format(asked)
        return {"messages": [user(question), assistant("-".join(word))], "answer": word}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the reply is the letters in order, with any other characters between them."""
        letters = re.findall(r"[^\W\d_]+", completion)
        return (
            all(len(letter) == 1 for letter in letters)
            and "".join(letters).lower() == conversation["answer"]
        )


class LetterCount(WordSkill):
    """The number of occurrences of a letter in a word, counted with the calculator."""

    key = "letter_count"

    def make(self, rng: random.Random) -> Conversation:
        word = self.draw_word(rng)
        letter = self.draw_letter(word, rng)
        # the start of the word's first token in the question
        before = '"' if rng.random() < 0.7 else " "
        asked_word = f'"{word}"' if before == '"' else word
        asked_letter = f'"{letter}"' if rng.random() < 0.3 else letter
        count = word.count(letter)
        call = f'"{word}".count("{letter}")' if before == '"' else f'" {word}".count("{letter}")'
        reply = f"It appears {count} {'time' if count == 1 else 'times'}."
        question = rng.choice(PHRASES["letter_count"]).format(letter=asked_letter, word=asked_word)
        parts = [python(call), python_output(str(count)), text(reply)]
        return {"messages": [user(question), assistant(parts)], "answer": count}

    @staticmethod
    def draw_letter(word: str, rng: random.Random) -> str:
        """A random letter, mostly a repeated one, so that always answering 1 is not rewarded."""
        form = rng.random()
        if form < 0.15:
            return rng.choice(LETTERS)
        repeated = [letter for letter in word if word.count(letter) > 1]
        return rng.choice(repeated if repeated and form < 0.80 else word)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the last number is the count."""
        return final_number(completion) == conversation["answer"]

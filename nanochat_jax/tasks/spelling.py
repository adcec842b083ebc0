"""Upstream's spelling tasks: counting a letter in a word by hand and with Python, and spelling.

Both use a list of 370,000 English words. Item i is a function of (split, i).
"""

import random
from pathlib import Path

from nanochat_jax.files import fetch_file
from nanochat_jax.tasks.base import (
    PHRASES,
    Conversation,
    assistant,
    python,
    python_output,
    text,
    user,
)
from nanochat_jax.tasks.gsm8k import same_final_answer
from nanochat_jax.tasks.skills import LETTERS, Skill, Split

WORDS_URL = (
    "https://raw.githubusercontent.com/dwyl/english-words/"
    "20f5cc9b3f0ccc8ce45d814c532b7c2031bba31c/words_alpha.txt"
)
WORDS_SHA256 = "3ed0c94610d8bcf7c11bbb49c56aa49c7234d32b66824df91f554169e572da48"
# Python seeds with the absolute value: negative seeds would repeat training items.
TEST_SEED = 10_000_000


def load_words_alpha(base: Path) -> list[str]:
    """The word list, downloaded to the base directory if missing."""
    path = fetch_file(WORDS_URL, base / "words_alpha.txt", sha256=WORDS_SHA256)
    return path.read_text(encoding="utf-8").split()


class _OfWords(Skill):
    """A task about words of a list. Items are seeded by number, as upstream's."""

    def __init__(self, words: list[str], split: Split, *, size: int = 1000) -> None:
        super().__init__(split, size)
        self.words = list(words)

    def rng(self, index: int) -> random.Random:
        return random.Random(index + (TEST_SEED if self.split == "test" else 0))


class SpellingBee(_OfWords):
    """Counting a letter in a word: by hand, then with Python, then `#### count`."""

    key = "spelling_bee"

    def get_example(self, index: int) -> Conversation:
        rng = self.rng(index)
        word = rng.choice(self.words)
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(LETTERS)
        question = rng.choice(PHRASES["spelling_bee"])
        if rng.random() < 0.3:
            question = question.lower()
        letter_quote, word_quote = rng.choice(["", "'", '"']), rng.choice(["", "'", '"'])
        question = question.format(
            letter=letter_quote + letter + letter_quote, word=word_quote + word + word_quote
        )
        if rng.random() < 0.5:
            question += "?"
        return {"messages": [user(question), assistant(self.count(word, letter))]}

    @staticmethod
    def count(word: str, letter: str) -> list[dict[str, str]]:
        lines, hits = [], 0
        for i, character in enumerate(word, 1):
            # no space, so the letter has the same token as in the spelled word
            line = f"{i}:{character}"
            if character == letter:
                hits += 1
                line += f" hit! count={hits}"
            lines.append(line)
        manual = (
            f"Let me count the letter '{letter}' in the word '{word}'.\n\n"
            f"First I spell the word:\n{word}:{','.join(word)}\n\n"
            f"Now I go through it letter by letter:\n"
            + "\n".join(lines)
            + f"\n\nThat makes {hits}."
        )
        return [
            text(manual),
            text("\n\nLet me check this with Python:\n\n"),
            python(f"'{word}'.count('{letter}')"),
            python_output(str(hits)),
            text(f"\n\nPython says {hits}.\n\nThe answer is:\n\n#### {hits}"),
        ]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return same_final_answer(conversation, completion)


class SimpleSpelling(_OfWords):
    """Spelling a word, which letter counting depends on most. Only for training."""

    eval_type = None

    def __init__(self, words: list[str], split: Split, *, size: int = 1000) -> None:
        super().__init__(words, split, size=size)
        # another order than SpellingBee's, so item i is another word
        random.Random(42).shuffle(self.words)

    def get_example(self, index: int) -> Conversation:
        word = self.rng(index).choice(self.words)
        return {
            "messages": [user(f"Spell the word: {word}"), assistant(f"{word}:{','.join(word)}")]
        }

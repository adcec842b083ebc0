"""MMLU: questions of 57 subjects (Hendrycks et al. 2021, arXiv:2009.03300)."""

from typing import Any

from nanochat_jax.paths import Paths
from nanochat_jax.tasks.base import Conversation
from nanochat_jax.tasks.multiple_choice import MultipleChoice, multiple_choice

LETTERS = "ABCD"


class MMLU(MultipleChoice):
    """Splits: auxiliary_train (to train on), dev, validation, test."""

    key = "mmlu"

    def __init__(self, paths: Paths, split: str, **view: Any) -> None:
        super().__init__(paths, "cais/mmlu", "all", split, **view)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        conversation = multiple_choice(row["question"], row["choices"], LETTERS, LETTERS[row["answer"]])
        return conversation | {"subject": row["subject"]}

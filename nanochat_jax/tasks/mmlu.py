"""MMLU: questions about 57 subjects (Hendrycks et al. 2021, arXiv:2009.03300)."""

from nanochat_jax.paths import Paths
from nanochat_jax.tasks.base import Conversation
from nanochat_jax.tasks.hub import HubData
from nanochat_jax.tasks.multiple_choice import MultipleChoice, multiple_choice

LETTERS = "ABCD"


class MMLU(MultipleChoice):
    """Splits: auxiliary_train (for training), dev, validation, test."""

    data = HubData("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe")
    columns = ("question", "choices", "answer")
    key = "mmlu"

    def __init__(self, paths: Paths, split: str) -> None:
        super().__init__(paths, "all", split)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        return multiple_choice(row["question"], row["choices"], LETTERS, LETTERS[row["answer"]])

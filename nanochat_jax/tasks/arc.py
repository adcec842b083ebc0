"""ARC: science questions from school tests (Clark et al. 2018, arXiv:1803.05457)."""

from nanochat_jax.paths import Paths
from nanochat_jax.tasks.base import Conversation
from nanochat_jax.tasks.hub import HubData
from nanochat_jax.tasks.multiple_choice import MultipleChoice, multiple_choice


class ARC(MultipleChoice):
    """`subset` is ARC-Easy or ARC-Challenge."""

    data = HubData("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453")
    columns = ("question", "choices", "answerKey")

    def __init__(self, paths: Paths, subset: str, split: str) -> None:
        self.key = subset.lower().replace("-", "_")
        super().__init__(paths, subset, split)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        return multiple_choice(
            row["question"], row["choices"]["text"], row["choices"]["label"], row["answerKey"]
        )

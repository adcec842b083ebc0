"""SmolTalk: synthetic conversations on all topics (Allal et al. 2025, arXiv:2502.02737)."""

from nanochat_jax.paths import Paths
from nanochat_jax.tasks.base import Conversation
from nanochat_jax.tasks.hub import HubData, HubTask


class SmolTalk(HubTask):
    """The version for small models: 460K training and 24K test conversations."""

    data = HubData(
        "HuggingFaceTB/smol-smoltalk",
        "f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc",
        "data/{split}-*.parquet",
    )
    columns = ("messages",)

    def __init__(self, paths: Paths, split: str) -> None:
        super().__init__(paths, "default", split)

    def get_example(self, index: int) -> Conversation:
        return {"messages": self.row(index)["messages"]}

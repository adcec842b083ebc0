"""HumanEval: write Python functions from docstrings, evaluated by tests (arXiv:2107.03374)."""

import re

from nanochat_jax.errors import UsageError
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.base import Conversation, assistant, user
from nanochat_jax.tasks.execution import execute_code
from nanochat_jax.tasks.hub import HubData, HubTask

CODE_BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)
TIME_LIMIT_S = 5.0
MEMORY_LIMIT_BYTES = 256 << 20


def extract_imports(prompt: str) -> str:
    """The import lines at the top of a prompt, which replies may omit."""
    imports = []
    for line in prompt.split("\n"):
        line = line.strip()
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


def extract_program(reply: str) -> str:
    """The first fenced code block, or the whole reply."""
    match = CODE_BLOCK.search(reply)
    return (match[1] if match else reply).strip()


class HumanEval(HubTask):
    """164 problems, only a test split."""

    data = HubData("openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544")
    columns = ("prompt", "canonical_solution", "entry_point", "test")
    key = "humaneval"
    eval_type = "generative"

    def __init__(self, paths: Paths, split: str = "test") -> None:
        if split != "test":
            raise UsageError(f"HumanEval has only the split test, not {split!r}")
        super().__init__(paths, "openai_humaneval", split)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        messages = [user(row["prompt"]), assistant(f"{row['prompt']}\n{row['canonical_solution']}")]
        return {"messages": messages, "entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the reply's code passes the tests, in a separate process with limits."""
        imports = extract_imports(conversation["messages"][0]["content"])
        check = f"{conversation['test']}\ncheck({conversation['entry_point']})"
        program = "\n\n".join([imports, extract_program(completion), check])
        return execute_code(program, timeout=TIME_LIMIT_S, memory_bytes=MEMORY_LIMIT_BYTES).success

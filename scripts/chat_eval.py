"""Evaluate a chat model: multiple choice by the most likely letter, other tasks by the reply.

python -m scripts.chat_eval -i sft
python -m scripts.chat_eval -i sft -a "ARC-Easy|GSM8K" -x 100
python -m scripts.chat_eval -i sft --task-file questions.jsonl
"""

from nanochat_jax import cli
from nanochat_jax.eval.chat_model import ChatEvalConfig, evaluate_chat

if __name__ == "__main__":
    cli.run(evaluate_chat, ChatEvalConfig, prog="scripts.chat_eval", description=__doc__)

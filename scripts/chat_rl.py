"""Reinforcement learning of the finetuned model on problems with checkable answers.

python -m scripts.chat_rl
python -m scripts.chat_rl --task "GSM8K|SpellingBee" --num-iterations 30
"""

from nanochat_jax import cli
from nanochat_jax.train.rl import ChatRLConfig, reinforce

if __name__ == "__main__":
    cli.run(reinforce, ChatRLConfig, prog="scripts.chat_rl", description=__doc__)

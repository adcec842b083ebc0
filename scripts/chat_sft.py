"""Finetune the midtrained model on conversations; only the assistant's tokens are trained.

python -m scripts.chat_sft --mesh 8x1
python -m scripts.chat_sft --source base --load-optimizer   no midtraining, as upstream in 2026
"""

from nanochat_jax import cli
from nanochat_jax.train.stages import ChatSFTConfig, supervised_finetune

if __name__ == "__main__":
    cli.run(supervised_finetune, ChatSFTConfig, prog="scripts.chat_sft", description=__doc__)

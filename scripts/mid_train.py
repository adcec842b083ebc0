"""Midtrain the base model on conversations: chat format, tools, skills. All tokens are trained.

python -m scripts.mid_train --mesh 8x1
"""

from nanochat_jax import cli
from nanochat_jax.train.stages import MidTrainConfig, midtrain

if __name__ == "__main__":
    cli.run(midtrain, MidTrainConfig, prog="scripts.mid_train", description=__doc__)

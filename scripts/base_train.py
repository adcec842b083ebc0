"""Pretrain a base model; all hyperparameters follow from --depth.

    python -m scripts.base_train --depth 20 --mesh 8x1
    python -m scripts.base_train --depth 4 --max-seq-len 512 --device-batch-size 1 \\
        --total-batch-size 512 --num-iterations 20
"""

from nanochat_jax import cli
from nanochat_jax.train.pretrain import BaseTrainConfig, pretrain

if __name__ == "__main__":
    cli.run(pretrain, BaseTrainConfig, prog="scripts.base_train", description=__doc__)

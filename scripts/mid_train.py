"""Midtrain the base model on conversations: chat format, tools, skills. All tokens are trained.

python -m scripts.mid_train --mesh 8x1
"""

from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.cli import flag
from nanochat_jax.tasks.mixtures import mixture_for
from nanochat_jax.train.finetune import FinetuneConfig, Stage, finetune
from nanochat_jax.train.optim import trapezoid


@dataclass(frozen=True, kw_only=True)
class MidTrainConfig(FinetuneConfig):
    total_batch_size: int = flag(
        -1, "tokens per optimizer step; -1: as the base run", at_least=1, at_most=2**40, also=-1
    )
    eval_every: int = flag(
        150, "steps between evaluations; -1: only at the end", at_least=1, at_most=10**9, also=-1
    )
    warmdown_ratio: float = flag(0.2, "share of the run with falling rate", at_least=0, at_most=1)


def main(config: MidTrainConfig) -> None:
    finetune(
        config,
        Stage(
            name="mid_train",
            section="Midtraining",
            source="base",
            target="mid",
            mode="stream",
            primary="val_bpb",
            num_epochs=1,
            step_rows=None,
            mixture=lambda data, split, paths: mixture_for(
                data, "mid", split, paths, named=config.mixture
            ),
            lr_schedule=lambda steps: trapezoid(
                steps, warmup=0, warmdown_ratio=config.warmdown_ratio, final_fraction=0.0
            ),
        ),
    )


if __name__ == "__main__":
    cli.run(main, MidTrainConfig, prog="scripts.mid_train", description=__doc__)

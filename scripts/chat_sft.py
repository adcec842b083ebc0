"""Finetune the midtrained model on whole conversations; only what the assistant says trains.

    python -m scripts.chat_sft --mesh 8x1
"""

from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.cli import flag
from nanochat_jax.finetune import FinetuneConfig, finetune
from nanochat_jax.optim import trapezoid


@dataclass(frozen=True, kw_only=True)
class ChatSFTConfig(FinetuneConfig):
    source: str = flag("mid", "stage to start from", choices=["base", "mid"])
    packing: str = flag("rows", "how conversations fill rows; rows: several, best fit; single: one a row, as upstream "
                        "until 2026", choices=["rows", "single"])
    num_epochs: int = flag(1, "passes over the mixture")
    device_batch_size: int = flag(4, "rows per device and micro-step")
    total_batch_size: int = flag(-1, "tokens per optimizer step; -1: one micro-step")
    init_lr_frac: float = flag(0.02, "factor of all rates")
    eval_every: int = flag(100, "steps between evaluations; -1: only at the end")
    warmdown_ratio: float = flag(1.0, "share of the run with falling rate")


def main(config: ChatSFTConfig) -> None:
    finetune(
        config, name="chat_sft", section="Chat SFT", source=config.source, target="sft", stage="sft",
        mode=config.packing, num_epochs=config.num_epochs, primary="val_loss",
        lr_schedule=lambda steps: trapezoid(steps, warmup=0, warmdown_ratio=config.warmdown_ratio, final_fraction=0.0),
    )


if __name__ == "__main__":
    cli.run(main, ChatSFTConfig, prog="scripts.chat_sft", description=__doc__.splitlines()[0])

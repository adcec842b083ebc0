"""Hyperparameters of pretraining: each architecture's defaults, and what the model's shape decides
(steps, batch size, weight decay, learning-rate scale).

`train.optim.make_optimizer` also scales the AdamW groups' learning rates by the width.
"""

import math
from dataclasses import dataclass

from nanochat_jax.errors import UsageError
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.size import flops_per_token, num_params, num_scaling_params


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Upstream's settings of one architecture.

    Attributes:
      embedding_lr, unembedding_lr, scalar_lr: learning rates of the AdamW groups at width 768.
      matrix_lr: Muon's learning rate.
      weight_decay: modern: Muon's cautious decay before scaling; classic: the AdamW groups'.
      grad_clip: largest norm of the gradient; 0: no limit.
      warmup_steps: steps of rising learning rate.
      warmdown_ratio: share of the run with falling learning rate.
      final_lr_frac: learning rate at the end, as a share of its peak.
      target_param_data_ratio: training tokens per parameter (modern: per scaling parameter).
      packing: how documents fill rows: see data/packing.py.
    """

    embedding_lr: float
    unembedding_lr: float
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    weight_decay: float
    grad_clip: float
    warmup_steps: int
    warmdown_ratio: float
    final_lr_frac: float
    target_param_data_ratio: float
    packing: str


MODERN = Defaults(
    embedding_lr=0.3,
    unembedding_lr=0.008,
    weight_decay=0.28,
    grad_clip=0.0,
    warmup_steps=40,
    warmdown_ratio=0.65,
    final_lr_frac=0.05,
    target_param_data_ratio=12,
    packing="bestfit",
)
CLASSIC = Defaults(
    embedding_lr=0.2,
    unembedding_lr=0.004,
    weight_decay=0.0,
    grad_clip=1.0,
    warmup_steps=0,
    warmdown_ratio=0.2,
    final_lr_frac=0.0,
    target_param_data_ratio=20,
    packing="stream",
)
DEFAULTS = {"modern": MODERN, "classic": CLASSIC}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of one pretraining run, from the model's shape and overrides."""

    total_batch_size: int  # tokens per optimizer step
    num_iterations: int
    # modern: cautious decay of the matrices; classic: decay of the AdamW groups
    weight_decay: float
    lr_scale: float  # modern: learning rates grow with the square root of the batch size

    @property
    def total_tokens(self) -> int:
        return self.total_batch_size * self.num_iterations


REFERENCE_BATCH = 2**19  # tokens per step that upstream's learning rates were tuned at (d12)


def derive_recipe(
    config: GPTConfig,
    *,
    reference: GPTConfig,
    total_batch_size: int = -1,
    num_iterations: int = -1,
    target_flops: float = -1.0,
    target_param_data_ratio: float = -1.0,
    weight_decay: float = 0.0,
) -> Recipe:
    """The recipe of a model. Negative values mean "derive it".

    Precedence for the number of steps: `num_iterations`, `target_flops`, `target_param_data_ratio`.
    For `modern`, batch and decay follow the ratio even if another argument sets the steps (B ~
    D^0.383, decay ~ sqrt(B) / D). `reference` is the d12 model with the same flags, at which the
    constants were tuned.
    """
    modern = config.arch == "modern"
    ratio = target_param_data_ratio
    if ratio <= 0:
        ratio = DEFAULTS[config.arch].target_param_data_ratio
    lr_scale = 1.0
    if modern:
        tokens = int(ratio * num_scaling_params(config))
        reference_tokens = ratio * num_scaling_params(reference)
        batch = total_batch_size
        if batch <= 0:
            batch = 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference_tokens) ** 0.383))
        lr_scale = math.sqrt(batch / REFERENCE_BATCH)
        weight_decay = weight_decay * lr_scale * (reference_tokens / tokens)
    else:
        tokens = int(ratio * num_params(config))
        batch = total_batch_size if total_batch_size > 0 else REFERENCE_BATCH
    if num_iterations <= 0:
        if target_flops > 0:
            num_iterations = round(target_flops / (flops_per_token(config) * batch))
        else:
            num_iterations = tokens // batch
    if num_iterations < 1:
        raise UsageError(
            f"the run would have {num_iterations} steps of {batch} tokens: set `num_iterations`, "
            "or a smaller `total_batch_size`"
        )
    return Recipe(
        total_batch_size=batch,
        num_iterations=num_iterations,
        weight_decay=weight_decay,
        lr_scale=lr_scale,
    )

"""Hyperparameters that the model's shape decides: steps, batch size, weight decay, learning-rate
scale.
"""

import math
from dataclasses import dataclass

from nanochat_jax.errors import UsageError
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.size import flops_per_token, num_params, num_scaling_params


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
    ratio = target_param_data_ratio if target_param_data_ratio > 0 else (12.0 if modern else 20.0)
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
            f"the run would have {num_iterations} steps of {batch} tokens: give --num-iterations, "
            "or a smaller --total-batch-size"
        )
    return Recipe(
        total_batch_size=batch,
        num_iterations=num_iterations,
        weight_decay=weight_decay,
        lr_scale=lr_scale,
    )

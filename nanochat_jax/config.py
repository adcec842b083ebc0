"""The model's configuration and the dial: everything that `--depth` decides, in one place.

Two architectures are one model with different fields: `classic` is nanochat of December 2025 (what Hugging Face's
NanoChatForCausalLM computes), `modern` is nanochat of July 2026. Training recipes differ likewise.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from nanochat_jax.cli import UsageError

Arch = Literal["classic", "modern"]

VE_GATE_CHANNELS = 12  # leading channels of a block's input that gate its value embedding
LARGEST_SCORE = 40.0  # attention's exponentials of scores start from their bound, not from their maximum
SMEAR_GATE_CHANNELS = 24  # leading channels of the embedding that gate the mix with the token before


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape and architecture of a model. Frozen and hashable, so that jitted functions take it as a static argument."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    # What the two eras do differently.
    arch: Arch = "modern"  # which initialisation; the recipe of the optimizer follows it too
    window_pattern: str | None = "SSSL"  # tiled over layers, the last always long; None: no layer is windowed
    rotary_base: float = 100_000.0
    rotary_dtype: Literal["float32", "bfloat16"] = "float32"  # upstream's classic tables are rounded to bfloat16
    qk_scale: float = 1.2  # gain on q and on k after their norm
    value_embeds: bool = True
    smear: bool = True
    lambdas: bool = True  # per-layer scales of the residual stream and of the embedding added back to it
    backout: bool = True
    vocab_multiple: int = 64  # embedding tables are padded to a multiple of this
    softcap: float = 15.0

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head width {self.head_dim} must be even, rotary embeddings turn pairs")
        narrowest = max(SMEAR_GATE_CHANNELS * self.smear, VE_GATE_CHANNELS * self.value_embeds)
        if self.n_embd < narrowest:
            raise ValueError(f"n_embd {self.n_embd} must be at least {narrowest}, the channels that the gates read")
        if self.window_pattern is not None and (not self.window_pattern or set(self.window_pattern) - set("SL")):
            raise ValueError(f"window_pattern {self.window_pattern!r} must be made of the letters S and L")
        if self.qk_scale**2 * math.sqrt(self.head_dim) >= LARGEST_SCORE:
            raise ValueError(f"head width {self.head_dim} is too large: scores could reach qk_scale^2 sqrt(head width), which "
                             f"must be below {LARGEST_SCORE}")

    @classmethod
    def classic(cls, depth: int, **overrides: Any) -> "GPTConfig":
        """The architecture of December 2025; width 64 * depth, heads of 128."""
        n_embd = 64 * depth
        n_head = max(1, math.ceil(n_embd / 128))
        era = dict(arch="classic", window_pattern=None, rotary_base=10_000.0, qk_scale=1.0, value_embeds=False,
                   smear=False, lambdas=False, backout=False, vocab_multiple=1, vocab_size=65536)
        return cls(**(dict(n_layer=depth, n_head=n_head, n_kv_head=n_head, n_embd=n_embd) | era | overrides))

    @classmethod
    def modern(cls, depth: int, *, aspect_ratio: int = 64, head_dim: int = 128, **overrides: Any) -> "GPTConfig":
        """The architecture of July 2026; width depth * aspect_ratio, rounded up to whole heads."""
        n_embd = round_up(depth * aspect_ratio, head_dim)
        n_head = n_embd // head_dim
        return cls(**(dict(n_layer=depth, n_head=n_head, n_kv_head=n_head, n_embd=n_embd) | overrides))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPTConfig":
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown model config fields {sorted(unknown)}")
        return cls(**values)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, self.vocab_multiple)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer: how many keys before its own position a query sees (w means w + 1 keys); None: all of them."""
        if self.window_pattern is None:
            return (None,) * self.n_layer
        short = round_up(math.ceil(self.sequence_len / 4), 128)
        size = {"S": short, "L": self.sequence_len}
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return tuple(size[letter] for letter in pattern)

    @property
    def value_embed_layers(self) -> tuple[int, ...]:
        """Every other layer has a value embedding, the last one included."""
        if not self.value_embeds:
            return ()
        return tuple(i for i in range(self.n_layer) if i % 2 == (self.n_layer - 1) % 2)

    @property
    def num_block_params(self) -> int:
        """Parameters of all matrices inside the blocks (value-embedding gates included)."""
        qkvo = self.n_embd * self.head_dim * (2 * self.n_head + 2 * self.n_kv_head)
        gates = len(self.value_embed_layers) * VE_GATE_CHANNELS * self.n_kv_head
        return self.n_layer * (qkvo + 8 * self.n_embd**2) + gates

    @property
    def num_scalar_params(self) -> int:
        return 2 * self.n_layer * self.lambdas + (SMEAR_GATE_CHANNELS + 1) * self.smear + self.backout

    @property
    def num_params(self) -> int:
        tables = 2 * self.padded_vocab_size * self.n_embd
        value_tables = len(self.value_embed_layers) * self.padded_vocab_size * self.n_kv_head * self.head_dim
        return tables + value_tables + self.num_block_params + self.num_scalar_params

    @property
    def num_scaling_params(self) -> int:
        """What modern scaling laws count: the blocks' matrices and the unembedding."""
        return self.num_block_params + self.padded_vocab_size * self.n_embd

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 per weight of a matmul, 12 per key seen by each head's channel."""
        linear = self.num_block_params + self.padded_vocab_size * self.n_embd + SMEAR_GATE_CHANNELS * self.smear
        keys = sum(self.sequence_len if w is None else min(w, self.sequence_len) for w in self.windows)
        return 6 * linear + 12 * self.n_head * self.head_dim * keys


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of one pretraining run, derived from the model's shape (both eras) and a few overrides."""

    total_batch_size: int  # tokens per optimizer step
    num_iterations: int
    weight_decay: float  # modern: cautious decay of the matrices; classic: decay of the AdamW groups
    lr_scale: float  # modern: learning rates grow with the square root of the batch

    @property
    def total_tokens(self) -> int:
        return self.total_batch_size * self.num_iterations


REFERENCE_BATCH = 2**19  # tokens per step that upstream's learning rates were tuned at (d12)


def derive_recipe(config: GPTConfig, *, reference: GPTConfig, total_batch_size: int = -1, num_iterations: int = -1,
                  target_flops: float = -1.0, target_param_data_ratio: float = -1.0,
                  weight_decay: float = 0.0) -> Recipe:
    """Horizon, batch and decay from the dial. Negative values mean "derive it".

    Precedence of the horizon: `num_iterations`, `target_flops`, `target_param_data_ratio`. In the modern era batch and
    decay follow the ratio even when something else sets the length (B ~ D^0.383, decay ~ sqrt(B) / D); `reference` is
    the d12 model with the same flags, at which the constants were tuned.
    """
    modern = config.arch == "modern"
    ratio = target_param_data_ratio if target_param_data_ratio > 0 else (12.0 if modern else 20.0)
    lr_scale = 1.0
    if modern:
        tokens = int(ratio * config.num_scaling_params)
        reference_tokens = ratio * reference.num_scaling_params
        batch = total_batch_size
        if batch <= 0:
            batch = 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference_tokens) ** 0.383))
        lr_scale = math.sqrt(batch / REFERENCE_BATCH)
        weight_decay = weight_decay * lr_scale * (reference_tokens / tokens)
    else:
        tokens = int(ratio * config.num_params)
        batch = total_batch_size if total_batch_size > 0 else REFERENCE_BATCH
    if num_iterations <= 0:
        if target_flops > 0:
            num_iterations = round(target_flops / (config.flops_per_token * batch))
        else:
            num_iterations = tokens // batch
    if num_iterations < 1:
        raise UsageError(f"the run would have {num_iterations} steps of {batch} tokens: give --num-iterations, "
                         "or a smaller --total-batch-size")
    return Recipe(total_batch_size=batch, num_iterations=num_iterations, weight_decay=weight_decay, lr_scale=lr_scale)

"""The model's configuration: its shape, which the depth decides, and its architecture.

What else the depth decides is listed in docs/code.md.

Two architectures are one model with different fields: `classic` is nanochat of December 2025
(Hugging Face's NanoChatForCausalLM), `modern` is nanochat of July 2026.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

Arch = Literal["classic", "modern"]

VE_GATE_CHANNELS = 12  # leading channels of a block's input that gate its value embedding
# largest |q| |k| / sqrt(h); the scores are shifted by their bound, not their maximum
LARGEST_SCORE = 40.0
# leading channels of the embedding that gate the mix with the previous token
SMEAR_GATE_CHANNELS = 24


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape and architecture of a model.

    Frozen and hashable, so jitted functions take it as a static argument.
    """

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    # What differs between the architectures.
    arch: Arch = "modern"  # selects the initial values and the optimizer
    # tiled over layers, the last always long; None: no layer is windowed
    window_pattern: str | None = "SSSL"
    rotary_base: float = 100_000.0
    # upstream's classic tables are rounded to bfloat16
    rotary_dtype: Literal["float32", "bfloat16"] = "float32"
    qk_scale: float = 1.2  # gain on q and on k after their norm
    value_embeds: bool = True
    smear: bool = True
    # per-layer scales of the residual stream and of the embedding added back to it
    lambdas: bool = True
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
            raise ValueError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head width {self.head_dim} must be even, rotary embeddings turn pairs"
            )
        narrowest = max(SMEAR_GATE_CHANNELS * self.smear, VE_GATE_CHANNELS * self.value_embeds)
        if self.n_embd < narrowest:
            raise ValueError(
                f"n_embd {self.n_embd} must be at least {narrowest}, the channels that the gates "
                "read"
            )
        if self.window_pattern is not None and (
            not self.window_pattern or set(self.window_pattern) - set("SL")
        ):
            raise ValueError(
                f"window_pattern {self.window_pattern!r} must be made of the letters S and L"
            )
        if self.qk_scale**2 * math.sqrt(self.head_dim) >= LARGEST_SCORE:
            raise ValueError(
                f"head width {self.head_dim} is too large: scores could reach qk_scale^2 "
                f"sqrt(head width), which must be below {LARGEST_SCORE}"
            )

    @classmethod
    def classic(cls, depth: int, **overrides: Any) -> "GPTConfig":
        """The `classic` architecture: width 64 * depth, heads of 128."""
        n_embd = 64 * depth
        n_head = max(1, math.ceil(n_embd / 128))
        values: dict[str, Any] = dict(
            n_layer=depth,
            n_head=n_head,
            n_kv_head=n_head,
            n_embd=n_embd,
            arch="classic",
            window_pattern=None,
            rotary_base=10_000.0,
            qk_scale=1.0,
            value_embeds=False,
            smear=False,
            lambdas=False,
            backout=False,
            vocab_multiple=1,
            vocab_size=65536,
        )
        return cls(**(values | overrides))

    @classmethod
    def modern(
        cls, depth: int, *, aspect_ratio: int = 64, head_dim: int = 128, **overrides: Any
    ) -> "GPTConfig":
        """The `modern` architecture: width depth * aspect_ratio, rounded up to whole heads."""
        n_embd = round_up(depth * aspect_ratio, head_dim)
        n_head = n_embd // head_dim
        values = dict(n_layer=depth, n_head=n_head, n_kv_head=n_head, n_embd=n_embd)
        return cls(**(values | overrides))

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
        """Per layer, the number of earlier keys a query sees besides its own; None: all."""
        if self.window_pattern is None:
            return (None,) * self.n_layer
        short = round_up(math.ceil(self.sequence_len / 4), 128)
        size = {"S": short, "L": self.sequence_len}
        pattern = [
            self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)
        ] + ["L"]
        return tuple(size[letter] for letter in pattern)

    @property
    def value_embed_layers(self) -> tuple[int, ...]:
        """Layers with a value embedding: every other one, counted back from the last."""
        if not self.value_embeds:
            return ()
        return tuple(i for i in range(self.n_layer) if i % 2 == (self.n_layer - 1) % 2)

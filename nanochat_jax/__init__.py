"""nanochat in JAX: from raw text to a chat model.

import nanochat_jax
model = nanochat_jax.load("sft")       # or a directory; see nanochat_jax/pretrained.py
model.generate("The capital of France is", max_tokens=16, temperature=0.0)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanochat_jax.pretrained import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> object:
    """Import `load` on first use, because it imports JAX."""
    if name == "load":
        from nanochat_jax.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""nanochat in JAX: everything between raw text and a chat model you can talk to.

import nanochat_jax
model = nanochat_jax.load("sft")            # or a directory; see nanochat_jax/pretrained.py
model.generate("The capital of France is", max_tokens=16, temperature=0.0)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanochat_jax.pretrained import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> object:
    """`load` brings JAX with it, so it is imported when it is asked for and not by `import
    nanochat_jax`.
    """
    if name == "load":
        from nanochat_jax.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

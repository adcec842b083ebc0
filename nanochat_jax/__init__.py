"""nanochat in JAX: everything between raw text and a chat model you can talk to."""

__version__ = "0.1.0"

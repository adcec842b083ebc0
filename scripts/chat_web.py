"""Upstream's name for scripts.serve."""

from nanochat_jax import cli
from scripts.serve import DESCRIPTION, Config, main

if __name__ == "__main__":
    cli.run(main, Config, prog="scripts.chat_web", description=DESCRIPTION)

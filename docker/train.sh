#!/bin/sh
# Entry point of the trainer's container. Without arguments, or with flags: scripts.speedrun. Other arguments are a command,
# such as `python -m nanochat_jax.dataset hf --preset k12`.
set -eu
case "${1:-}" in
    ""|-*) exec python -m scripts.speedrun "$@" ;;
    *) exec "$@" ;;
esac

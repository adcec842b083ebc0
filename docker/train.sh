#!/bin/sh
# A container of the trainer. Without arguments, or with flags: scripts.speedrun. Anything else is run as a command, such as
# `python -m nanochat_jax.dataset hf --preset k12`.
set -eu
case "${1:-}" in
    ""|-*) exec python -m scripts.speedrun "$@" ;;
    *) exec "$@" ;;
esac

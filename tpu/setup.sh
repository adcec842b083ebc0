#!/usr/bin/env bash
# Clone the repository on every worker of the slice and install it. Running it again brings the checkout up to date.
#   TPU_REPO=https://... tpu/setup.sh [--dry-run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ $# == 0 ]] || die "setup.sh takes no arguments but --dry-run, found: $*"

repo=${TPU_REPO:-$(git -C "$(dirname "${BASH_SOURCE[0]}")" remote get-url origin 2>/dev/null || true)}
[[ -n "$repo" ]] || die "TPU_REPO is not set, and this checkout has no remote that workers could clone"
printf -v quoted '%q' "$repo"
# The images' own Python is older than 3.11, and they have no Rust.
on_all_workers "set -e; export PATH=\$HOME/.local/bin:\$HOME/.cargo/bin:\$PATH; \
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; \
command -v cargo >/dev/null || curl --proto =https -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal; \
if [ -d nanochat_jax ]; then git -C nanochat_jax pull --ff-only; else git clone $quoted nanochat_jax; fi; \
cd nanochat_jax && source scripts/setup_env.sh && setup_env"

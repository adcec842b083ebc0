#!/usr/bin/env bash
# The thousand-dollar model: the line of speedrun.sh at depth 32, on one node of eight large GPUs. Flags are those of
# scripts.speedrun; a second run continues where the first one stopped. Look before you pay:
#
#     bash run1000.sh --dry-run
#
# Planned from FLOPs at 40% of the peak of 8xH100 or H200 (bf16), not measured: nobody has run this yet.
#
#     model        2.8B parameters, 1.7B of them matrices and unembedding, which set the number of tokens (12 for each)
#     data         522 shards of ClimbMix, 20B tokens; the tokenizer starts on the first 10 while the rest comes in
#     base_train   9,600 steps of 2M tokens, 19 hours
#     the rest     half an hour: 400M tokens of midtraining, SFT; how long the evaluations take is a guess
#     in all       about 20 hours; at 3 dollars per GPU and hour 480 dollars, with room for a restart within 1,000
#     memory       rows at a time, --remat and --fsdp follow from what a GPU holds: on 80 GB 8 rows, parameters sharded and what
#                  is element-wise recomputed, 34 GiB by the compiled plan. XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 gives more, as
#                  JAX takes three quarters by itself
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh
setup_env

# WANDB_RUN=d32 (and WANDB_API_KEY) draws the curves on Weights & Biases; that needs the extra `wandb`.
exec .venv/bin/python -m scripts.speedrun --depth 32 "$@"

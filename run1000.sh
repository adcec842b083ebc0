#!/usr/bin/env bash
# The thousand-dollar model: the pipeline of speedrun.sh at depth 32, on one node of eight large GPUs. Flags are those of
# scripts.speedrun; a second run continues where the first one stopped. Print the plan before you pay:
#
#     bash run1000.sh --dry-run
#
# Estimated from FLOPs at 40% of the peak of 8xH100 or H200 (bf16), not measured: nobody has run this yet.
#
#     model        2.8B parameters, 1.7B of them matrices and unembedding, which set the number of tokens (12 for each)
#     data         522 shards of ClimbMix, 20B tokens; the tokenizer trains on the first 10 during the download
#     base_train   9,600 steps of 2M tokens, 19 hours
#     the rest     half an hour: 400M tokens of midtraining, SFT; the time of the evaluations is a guess
#     in all       about 20 hours; 480 dollars at 3 dollars per GPU hour, so 1,000 leave room for a restart
#     memory       batch per device, --remat and --fsdp follow from a GPU's memory: on 80 GB 8 rows, sharded parameters and
#                  --remat minimal, 34 GiB by the compiled plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh
setup_env

# WANDB_RUN=d32 (and WANDB_API_KEY) logs to Weights & Biases; this needs the extra `wandb`.
exec .venv/bin/python -m scripts.speedrun --depth 32 "$@"

"""The commands of the pipeline as one would type them: `stage  module arguments`.

An indented row belongs to the command before it. `plan.py` fills in {depth} and {data}, counts the
shards that the depth needs, and appends what depends on the machine: mesh, batch per device, memory
savings, logging.
"""

import re
import shlex

SMALL_DEPTH = 4
SMALL_DEVICE_BATCH = 16

# The embedded corpus is too small for the scaling laws. Two idle cores train this model in 6
# minutes, evaluations included.
SMALL = """
data           nanochat_jax.dataset embedded
tok_train      scripts.tok_train --data embedded --vocab-size 2048
tok_eval       scripts.tok_eval --data embedded
base_train     scripts.base_train --data embedded --depth {depth} --model-tag d{depth}
               --head-dim 64 --max-seq-len 256 --window-pattern L --packing stream
               --total-batch-size 4096 --num-iterations 210 --lr-scale 0.5 --weight-decay 0.1
               --warmup-steps 10 --eval-every 70 --eval-tokens 65536
base_loss      scripts.base_loss --model-tag d{depth} --split-tokens 131072
base_eval      scripts.base_eval --model-tag d{depth}
mid_train      scripts.mid_train --model-tag d{depth} --total-batch-size 4096 --num-iterations 250
               --init-lr-frac 0.5 --warmdown-ratio 0.5 --eval-every 80 --eval-tokens 16384
chat_eval_mid  scripts.chat_eval -i mid --model-tag d{depth} --max-new-tokens 64
chat_sft       scripts.chat_sft --model-tag d{depth} --total-batch-size 4096 --num-iterations 60
               --init-lr-frac 0.3 --eval-every 30 --eval-tokens 16384
chat_eval_sft  scripts.chat_eval -i sft --model-tag d{depth} --max-new-tokens 64
chat_rl        scripts.chat_rl --model-tag d{depth} --task 'WordArithmetic|Spelling'
               --num-iterations 36 --examples-per-step 32 --num-samples 16 --device-batch-size 16
               --num-slots 128 --max-new-tokens 40 --init-lr-frac 0.06 --eval-every 12
               --eval-examples 128 --save-every 12
chat_eval_rl   scripts.chat_eval -i rl --model-tag d{depth} --max-new-tokens 64
report         nanochat_jax.report generate
"""

# The other corpora: all settings follow from the depth, the number of shards too (-n is d20's).
SCALED = """
data           nanochat_jax.dataset --dataset {data} -n 10
data_rest      nanochat_jax.dataset --dataset {data} -n 136
tok_train      scripts.tok_train --data {data} --vocab-size 32768
tok_eval       scripts.tok_eval --data {data}
base_train     scripts.base_train --data {data} --depth {depth} --model-tag d{depth}
base_loss      scripts.base_loss --model-tag d{depth}
base_eval      scripts.base_eval --model-tag d{depth}
mid_train      scripts.mid_train --model-tag d{depth}
chat_eval_mid  scripts.chat_eval -i mid --model-tag d{depth}
chat_sft       scripts.chat_sft --model-tag d{depth}
chat_eval_sft  scripts.chat_eval -i sft --model-tag d{depth}
chat_rl        scripts.chat_rl --model-tag d{depth}
chat_eval_rl   scripts.chat_eval -i rl --model-tag d{depth}
report         nanochat_jax.report generate
"""

# `--recipe record` replaces or adds these flags and leaves out the stages below: upstream's way to
# GPT-2's CORE in 2026. 8 tokens per parameter, no midtraining, its cadence of evaluations; SFT's
# defaults follow from its source. float8 where the chip has units for it (plan.py).
RECORD = """
base_train     --target-param-data-ratio 8 --eval-tokens 41943040 --core-metric-every 2000
base_eval      --split-tokens 20971520
chat_sft       --source base
"""
# SFT makes up for midtraining.
SMALL_RECORD = """
chat_sft       --source base --num-iterations 300 --init-lr-frac 0.5 --eval-every 100
               --chatcore-every -1
"""
NOT_IN_RECORD = ("base_loss", "mid_train", "chat_eval_mid")
RECORD_DEPTH = 24

# Replaces or adds flags of each recipe, to try an installation.
SMOKE = """
base_train     --num-iterations 4 --eval-tokens 8192
base_loss      --split-tokens 16384
base_eval      --max-per-task 8
mid_train      --num-iterations 4 --eval-tokens 8192
chat_eval_mid  --max-problems 8 --max-new-tokens 16
chat_sft       --num-iterations 4 --eval-tokens 8192
chat_eval_sft  --max-problems 8 --max-new-tokens 16
chat_rl        --num-iterations 2 --examples-per-step 2 --max-new-tokens 8 --eval-every -1
               --eval-examples 4
chat_eval_rl   --max-problems 8 --max-new-tokens 16
"""


def read_recipe(text: str, **values: object) -> dict[str, list[str]]:
    """The words of the commands, by stage."""
    lines = re.sub(r"\n +", " ", text).format(**values).split("\n")
    return {words[0]: words[1:] for words in map(shlex.split, lines) if words}


STAGE_NAMES = tuple(line.split()[0] for line in SCALED.split("\n") if line)


def flag_value(command: list[str], name: str, default: str) -> str:
    return command[command.index(name) + 1] if name in command else default


def replace_flags(command: list[str], flags: list[str]) -> list[str]:
    """`command` with the values of `flags` (`--name value ...`), in place or at the end."""
    command = list(command)
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        if name in command:
            command[command.index(name) + 1] = value
        else:
            command += [name, value]
    return command

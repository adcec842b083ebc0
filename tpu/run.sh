#!/usr/bin/env bash
# Run a script of the line on every worker of the slice, as one program of several processes.
#   tpu/run.sh [--dry-run] base_train --depth 20
# It goes on when the connection is lost: each worker logs to ~/nanochat_jax/tpu.log. The checkpoints of all workers are one:
# NANOCHAT_CHECKPOINT_DIR=gs://... names a bucket for them; else NANOCHAT_BASE_DIR must be a folder that all share (Filestore).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ $# -ge 1 ]] || die "run.sh needs the name of a script, such as: tpu/run.sh base_train --depth 20"
[[ "$1" =~ ^[a-z_]+$ ]] || die "run.sh: $1 is not the name of a command"

printf -v command '%q ' .venv/bin/python -m nanochat_jax "$@"
variables="NANOCHAT_DISTRIBUTED=1"
for name in NANOCHAT_BASE_DIR NANOCHAT_CHECKPOINT_DIR; do
    if [[ -n "${!name:-}" ]]; then
        printf -v value '%q' "${!name}"
        variables+=" $name=$value"
    fi
done
on_all_workers "cd nanochat_jax && nohup env $variables $command >>tpu.log 2>&1 </dev/null & \
sleep 1; tail -n 0 -f --pid \$! nanochat_jax/tpu.log; wait \$!"

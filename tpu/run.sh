#!/usr/bin/env bash
# Run a script of the line on every worker of the slice, as one program of several processes.
#   tpu/run.sh [--dry-run] base_train --depth 20
# It goes on when the connection is lost: each worker logs to ~/nanochat_jax/tpu.log. NANOCHAT_BASE_DIR must be a folder
# that all workers share (Filestore, or a bucket mounted by gcsfuse), for their checkpoints are one.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ $# -ge 1 ]] || die "run.sh needs the name of a script, such as: tpu/run.sh base_train --depth 20"
[[ "$1" =~ ^[a-z_]+$ ]] || die "run.sh: $1 is not the name of a script"

printf -v command '%q ' .venv/bin/python -m "scripts.$1" "${@:2}"
variables="NANOCHAT_DISTRIBUTED=1"
if [[ -n "${NANOCHAT_BASE_DIR:-}" ]]; then
    printf -v base '%q' "$NANOCHAT_BASE_DIR"
    variables+=" NANOCHAT_BASE_DIR=$base"
fi
on_all_workers "cd nanochat_jax && nohup env $variables $command >>tpu.log 2>&1 </dev/null & \
sleep 1; tail -n 0 -f --pid \$! nanochat_jax/tpu.log; wait \$!"

#!/usr/bin/env bash
# After a preemption: ask for the slice again if it is gone, set it up, and go on from the newest checkpoint.
#   tpu/resume.sh [--dry-run] base_train --depth 20
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source-path=SCRIPTDIR
source "$here/common.sh"
[[ $# -ge 1 ]] || die "resume.sh needs the name of a script and its flags, as run.sh had them"
export DRY_RUN

state=$(run gcloud compute tpus queued-resources describe "$TPU_NAME" --zone "$TPU_ZONE" --format "value(state.state)") || state=GONE
if [[ "$DRY_RUN" == 1 ]]; then
    echo "$state"
    state=SUSPENDED
fi
case $state in
ACTIVE) ;;
SUSPENDED | FAILED)  # a preempted slice is SUSPENDED: it must be deleted before its name is free
    bash "$here/delete.sh"
    bash "$here/create.sh"
    ;;
GONE) bash "$here/create.sh" ;;
*) die "$TPU_NAME is $state: wait until it is ACTIVE, or give it up with tpu/delete.sh" ;;
esac
bash "$here/setup.sh"
bash "$here/run.sh" "$@" --resume

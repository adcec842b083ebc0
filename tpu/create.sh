#!/usr/bin/env bash
# Ask for a TPU slice as a queued resource, and wait until it is there. Settings: see common.sh.
#   tpu/create.sh [--dry-run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ $# == 0 ]] || die "create.sh takes no arguments but --dry-run, found: $*"

request=(gcloud compute tpus queued-resources create "$TPU_NAME" --node-id "$TPU_NAME" --zone "$TPU_ZONE"
    --accelerator-type "$TPU_TYPE" --runtime-version "$TPU_VERSION")
[[ "$TPU_SPOT" == 1 ]] && request+=(--spot)
run "${request[@]}"

describe=(gcloud compute tpus queued-resources describe "$TPU_NAME" --zone "$TPU_ZONE" --format "value(state.state)")
if [[ "$DRY_RUN" == 1 ]]; then
    run "${describe[@]}"
    exit
fi
while true; do
    state=$("${describe[@]}")
    echo "$(date +%H:%M:%S) $TPU_NAME is $state" >&2
    case $state in
    ACTIVE) break ;;
    FAILED | SUSPENDED | SUSPENDING) die "$TPU_NAME is $state: run tpu/delete.sh, then ask again" ;;
    esac
    sleep 30
done

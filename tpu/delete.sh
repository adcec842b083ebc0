#!/usr/bin/env bash
# Give the slice back, with its queued resource. What is on the workers' disks is lost.
#   tpu/delete.sh [--dry-run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ $# == 0 ]] || die "delete.sh takes no arguments but --dry-run, found: $*"
run gcloud compute tpus queued-resources delete "$TPU_NAME" --zone "$TPU_ZONE" --force --quiet

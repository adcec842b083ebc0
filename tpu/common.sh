# shellcheck shell=bash
# Sourced by the scripts beside it. Settings come from the environment:
#   TPU_NAME      name of the TPU VM and of its queued resource   (nanochat)
#   TPU_TYPE      accelerator type                                (v6e-8)
#   TPU_ZONE      zone                                            (us-east5-b)
#   TPU_VERSION   software version                                (v2-alpha-tpuv6e, v2-alpha-tpuv5-lite, v2-alpha-tpuv5)
#   TPU_SPOT      1 for spot capacity, cheaper and preemptible    (1)
#   TPU_REPO      what `git clone` on the workers takes
#   DRY_RUN       1 prints every command and runs none
TPU_NAME=${TPU_NAME:-nanochat}
TPU_TYPE=${TPU_TYPE:-v6e-8}
TPU_ZONE=${TPU_ZONE:-us-east5-b}
TPU_SPOT=${TPU_SPOT:-1}
DRY_RUN=${DRY_RUN:-0}
if [[ "${1:-}" == --dry-run ]]; then
    DRY_RUN=1
    shift
fi

die() {
    echo "error: $*" >&2
    exit 2
}

case $TPU_TYPE in
v6e-*) TPU_VERSION=${TPU_VERSION:-v2-alpha-tpuv6e} ;;
v5litepod-*) TPU_VERSION=${TPU_VERSION:-v2-alpha-tpuv5-lite} ;;
v5p-*) TPU_VERSION=${TPU_VERSION:-v2-alpha-tpuv5} ;;
*) TPU_VERSION=${TPU_VERSION:?"TPU_VERSION must be set for TPU_TYPE=$TPU_TYPE"} ;;
esac

run() {
    if [[ "$DRY_RUN" == 1 ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# Runs a command line on every worker of the slice; fails if it fails on any.
on_all_workers() {
    run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$TPU_ZONE" --worker all --command "$1"
}

[[ "$DRY_RUN" == 1 ]] || command -v gcloud >/dev/null ||
    die "gcloud is not installed: https://cloud.google.com/sdk/docs/install (or give --dry-run to see the commands)"

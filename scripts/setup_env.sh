# shellcheck shell=bash
# Sourced by speedrun.sh and test.sh in the root of the checkout. `setup_env EXTRA...` creates `.venv` if it is missing and
# installs the package into it, editable, with the extras of this machine and the given ones. A stamp in `.venv` records
# what was installed, so that the next run starts immediately. Versions are those of constraints.txt, with which the tests
# passed; NANOCHAT_NEWEST=1 installs the newest that pyproject.toml allows.

say() { echo "$*" >&2; }

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

has_tpu() {
    [[ -n "${TPU_NAME:-}${TPU_WORKER_ID:-}" ]] && return
    compgen -G '/dev/accel[0-9]*' >/dev/null && return
    # Newer TPUs are VFIO devices. Google's vendor id is not enough: its network cards have it too.
    local device
    for device in /sys/bus/pci/devices/*; do
        if grep -qsx 0x1ae0 "$device/vendor" && grep -qsE '^0x00(27|56|5e|62|63|6f|76)$' "$device/device"; then return; fi
    done
    return 1
}

# CUDA 13 needs driver 580 and cards of compute capability 7.5 (Turing); CUDA 12 needs driver 525.
gpu_extra() {
    local driver capability extra=gpu
    while IFS=', ' read -r driver capability; do
        if ((${driver%%.*} < 525)); then
            say "error: the NVIDIA driver $driver is too old for JAX: install 525 or later, or 580 for CUDA 13"
            return 1
        fi
        if ((${driver%%.*} < 580 || ${capability/./} < 75)); then extra=gpu-cuda12; fi
    done < <(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader)
    echo "$extra"
}

# The lowest minor version of Python 3. JAX for Python 3.11 has faults on GPUs.
lowest_python() { if has_gpu; then echo 12; else echo 11; fi; }

machine_extras() {
    if has_gpu; then gpu_extra; elif has_tpu; then echo tpu,gcs; else echo cpu,offline; fi
}

make_venv() {
    local python lowest
    lowest=$(lowest_python)
    if [[ -x .venv/bin/python ]] && .venv/bin/python -c '' 2>/dev/null; then
        if .venv/bin/python -c "import sys; exit(sys.version_info < (3, $lowest))"; then return; fi
        say "error: GPUs need Python 3.12 or 3.13, and .venv has $(.venv/bin/python --version): install one, then delete .venv"
        exit 1
    fi
    for python in python3.13 python3.12 python3.11 python3; do
        # A name on PATH may be a shim that does not run, and some distributions omit ensurepip.
        if "$python" -c "import ensurepip, sys; exit(not (3, $lowest) <= sys.version_info[:2] <= (3, 13))" 2>/dev/null; then
            say "making .venv with $("$python" --version)"
            "$python" -m venv --clear .venv && return
        fi
    done
    if command -v uv >/dev/null; then
        uv venv --clear --seed --python ">=3.$lowest,<3.14" .venv && return
    fi
    say "error: no Python 3.$lowest to 3.13 that can make a virtual environment was found; python3 is"
    say "$(python3 --version 2>&1 || true). Install one (for example 'sudo apt install python3 python3-venv'), or uv, which"
    say "brings its own: https://docs.astral.sh/uv/"
    exit 1
}

newest() { [[ -n "${NANOCHAT_NEWEST:-}" && "$NANOCHAT_NEWEST" != 0 ]]; }

install_package() {
    local versions=(--constraint constraints.txt)
    # uv is faster but does not read pip's settings; if these name an index, pip installs.
    if command -v uv >/dev/null && ! .venv/bin/python -m pip config list 2>/dev/null | grep -qE 'index|find-links'; then
        newest && versions=(--upgrade)
        uv pip install --quiet --python .venv/bin/python "${versions[@]}" --editable ".[$1]"
        return
    fi
    newest && versions=(--upgrade --upgrade-strategy eager)
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${versions[@]}" --editable ".[$1]"
}

# The crate is compiled here: without Rust and a C linker the installation would fail minutes later, with a long message.
check_toolchain() {
    local required installed
    required=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' rustbpe/Cargo.toml)
    installed=$(cargo --version 2>/dev/null | cut -d' ' -f2) || true
    if [[ -z "$installed" || "$(printf '%s\n' "$required" "$installed" | sort -V | head -n1)" != "$required" ]]; then
        say "error: the tokenizer is a Rust crate and needs cargo $required or newer; found: ${installed:-none}. Install it with"
        say "    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y"
        say "or from the distribution, if its version is new enough: 'sudo apt install cargo', 'sudo dnf install cargo' or"
        say "'sudo pacman -S rust'. Then run this script again."
        exit 1
    fi
    if ! command -v cc >/dev/null; then
        say "error: Rust needs a C linker, and 'cc' is missing: 'sudo apt install gcc libc6-dev', or on a Mac"
        say "'xcode-select --install'. Then run this script again."
        exit 1
    fi
}

setup_env() {
    local extra extras fingerprint stamp
    [[ -d "$HOME/.cargo/bin" ]] && PATH="$PATH:$HOME/.cargo/bin" # rustup was run, the shell not restarted
    make_venv
    extras=$(machine_extras)
    for extra in "$@"; do [[ ",$extras," == *",$extra,"* ]] || extras+=",$extra"; done
    stamp=".venv/.installed-${extras//,/-}"
    fingerprint=$(
        {
            pwd
            .venv/bin/python --version
            if newest; then echo newest; else cat constraints.txt; fi
            cat pyproject.toml rustbpe/Cargo.toml rustbpe/Cargo.lock rustbpe/src/*.rs
        } | cksum
    )
    if [[ -f "$stamp" && "$(<"$stamp")" == "$fingerprint" ]] && compgen -G 'nanochat_jax/rustbpe*.so' >/dev/null; then
        return
    fi
    check_toolchain
    say "installing nanochat_jax[$extras] into .venv: the first time this takes a few minutes"
    if ! install_package "$extras"; then
        say
        say 'error: the installation failed; the reason is above.'
        exit 1
    fi
    echo "$fingerprint" >"$stamp"
}

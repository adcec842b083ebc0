"""Installing: which versions, and when again; a stand-in for Python notes what pip is asked."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in
*"pip install"*) echo "$*" >>asked.txt ;;
*"config list"*) ;;
*--version*) echo "Python 3.${MINOR:-13}.0" ;;
*"sys.version_info < (3, 12)"*) [ "${MINOR:-13}" -ge 12 ] ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A stand-in checkout; calling it runs `setup_env EXTRA...` and gives pip's command lines."""
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "scripts/setup_env.sh",
        "rustbpe/Cargo.toml",
        "rustbpe/Cargo.lock",
        "rustbpe/src/lib.rs",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "nanochat_jax").mkdir()
    (tmp_path / "nanochat_jax/rustbpe.abi3.so").touch()
    bin = tmp_path / ".venv/bin"
    bin.mkdir(parents=True)
    (bin / "python").write_text(PYTHON)
    (bin / "python").chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "cut", "head", "sed", "sort", "cksum", "grep", "uname"):
        (tools / name).symlink_to(shutil.which(name))

    def tool(name, text):
        (tools / name).write_text(f"#!{shutil.which('sh')}\n{text}\n")
        (tools / name).chmod(0o755)

    tool("cargo", "echo cargo 1.99.0 '(abc 2026-01-01)'")
    tool("cc", "")

    def setup(*extras, uv=False, ends=0, **environment):
        if uv:
            tool("uv", 'echo "uv $*" >>asked.txt')
        env = {"HOME": str(tmp_path), "PATH": str(tools), **environment}
        script = f"set -euo pipefail; source scripts/setup_env.sh; setup_env {' '.join(extras)}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == ends, done.stderr
        asked = tmp_path / "asked.txt"
        lines = asked.read_text().splitlines() if asked.exists() else []
        asked.unlink(missing_ok=True)
        return lines if ends == 0 else [*lines, done.stderr]

    setup.path, setup.tool = tmp_path, tool
    return setup


def test_the_versions_are_those_of_the_constraints(checkout):
    [asked] = checkout("dev")
    assert "--constraint constraints.txt --editable .[" in asked and "upgrade" not in asked
    [asked] = checkout("dev", "torch", uv=True)
    assert (
        asked.startswith("uv pip install") and "--constraint constraints.txt --editable .[" in asked
    )


@pytest.mark.parametrize("uv", [False, True])
def test_the_constraints_can_be_lifted(checkout, uv):
    [asked] = checkout("dev", uv=uv, NANOCHAT_NEWEST="1")
    assert "--upgrade" in asked and "constraint" not in asked
    assert checkout("dev", NANOCHAT_NEWEST="1") == []
    assert "--constraint" in checkout("dev", NANOCHAT_NEWEST="0")[0]  # back again


@pytest.mark.parametrize("changed", ["constraints.txt", "pyproject.toml", "rustbpe/src/lib.rs"])
def test_a_change_installs_again_and_nothing_else_does(checkout, changed):
    assert len(checkout()) == 1 and checkout() == []
    with (checkout.path / changed).open("a") as file:
        file.write("\n")
    assert len(checkout()) == 1 and checkout() == []


@pytest.mark.parametrize(("missing", "said"), [("cargo", "found: none"), ("cc", "'cc' is missing")])
def test_what_is_missing_to_build_the_crate_is_said_before_anything_is_installed(
    checkout, missing, said
):
    (checkout.path / "tools" / missing).unlink()
    [error] = checkout(ends=1)
    assert said in error and error.startswith("error: ")


GPUS = {
    "580.65.06, 9.0": "gpu",
    "580.65.06, 10.0": "gpu",
    "580.65.06, 7.0": "gpu-cuda12",
    "580.65.06, 9.0\n580.65.06, 7.0": "gpu-cuda12",
    "570.124.06, 9.0": "gpu-cuda12",
}


def add_gpu(checkout, line):
    listing = f'case "$1" in -L) echo "GPU 0: a card" ;; *) echo "{line}" ;; esac'
    checkout.tool("nvidia-smi", listing)


@pytest.mark.parametrize("line, extra", GPUS.items())
def test_driver_and_cards_choose_the_cuda_version(checkout, line, extra):
    add_gpu(checkout, line)
    [asked] = checkout("dev")
    assert asked.endswith(f"--editable .[{extra},dev]")


def test_an_old_driver_and_an_old_python_are_refused_in_one_line(checkout):
    add_gpu(checkout, "470.82.01, 7.5")
    [error] = checkout(ends=1)
    assert (
        error.startswith("error: the NVIDIA driver 470.82.01 is too old") and "\n" not in error[:-1]
    )
    add_gpu(checkout, "580.65.06, 9.0")
    [error] = checkout(ends=1, MINOR="11")
    assert error.startswith("error: GPUs need Python 3.12") and "\n" not in error[:-1]


def pins():
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_the_constraints_hold_one_allowed_version_of_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    direct = project["dependencies"] + [
        line
        for name in ("offline", "wandb", "trackio", "torch", "docs", "dev")
        for line in extras[name]
    ]
    for python in ("3.11", "3.12", "3.13"):
        gpu = extras["gpu"] + extras["gpu-cuda12"] if python != "3.11" else []
        where = {
            "python_version": python,
            "python_full_version": f"{python}.1",
            "sys_platform": "linux",
            "platform_machine": "x86_64",
            "platform_python_implementation": "CPython",
        }
        found = {}
        for pin in pins():
            if pin.marker is None or Marker(str(pin.marker)).evaluate(where):
                [only] = pin.specifier
                assert (
                    only.operator == "=="
                    and found.setdefault(normal(pin.name), only.version) == only.version
                )
        for line in direct + gpu:
            wanted = Requirement(line)
            if wanted.name != "pip":  # which installs all the others
                assert wanted.specifier.contains(found[normal(wanted.name)]), (
                    f"{line}: {found[normal(wanted.name)]}"
                )


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

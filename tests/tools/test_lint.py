"""The linters that the workflow runs, where they are installed (extra `dev`)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER, TPU = ROOT / "docker", ROOT / "tpu"
SHELL = ("run1000.sh", "speedrun.sh", "test.sh", "scripts/setup_env.sh")


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache", "."],
        ["ruff", "format", "--no-cache", "--check", "."],
        ["shellcheck", "-x", "-e", "SC2119", *SHELL, *DOCKER.glob("*.sh")],
        ["shellcheck", "-x", *TPU.glob("*.sh"), TPU / "slurm.sbatch"],
        ["hadolint", DOCKER / "Dockerfile"],
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", *DOCKER.glob("*.yml")],
        ["mypy", "--cache-dir={scratch}"],
    ],
    ids=lambda command: " ".join(map(str, command[:2])),
)
def test_a_linter_finds_nothing(command, tmp_path):
    tool = shutil.which(command[0], path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip(f"{command[0]} is not installed")
    argv = [str(word).format(scratch=tmp_path) for word in command[1:]]
    found = subprocess.run([tool, *argv], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr

"""The linters that the workflow runs, where they are installed (extra `dev`)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lint(tool: str, *argv: str) -> None:
    path = shutil.which(tool, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{tool} is not installed")
    found = subprocess.run([path, *argv], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


def test_ruff_finds_nothing():
    lint("ruff", "check", "--no-cache", ".")


@pytest.mark.slow
def test_mypy_finds_nothing(tmp_path):
    lint("mypy", f"--cache-dir={tmp_path}")

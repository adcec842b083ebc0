"""`nanochat COMMAND`: every script under one name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import run_here

from nanochat_jax import cli
from nanochat_jax.__main__ import commands

ROOT = Path(__file__).parents[2]


def python(*argv, cwd):
    env = os.environ | {"PYTHONPATH": str(ROOT), "NANOCHAT_BASE_DIR": str(cwd)}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=cwd, env=env)


def nanochat(*argv, cwd, **environment):
    return run_here("nanochat_jax", *argv, base=cwd, **environment)


def test_every_script_is_a_command():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__"}
    assert set(commands()) == scripts | {"dataset", "report"}


def test_a_command_gets_its_flags_and_returns_its_exit_code(tmp_path):
    done = nanochat("tok-train", "--vocab-size", "many", cwd=tmp_path)
    assert done.returncode == 2 and "expected an integer, got 'many'" in done.stderr
    assert nanochat("report", "reset", cwd=tmp_path).returncode == 0
    assert (tmp_path / "report").is_dir()


@pytest.mark.parametrize(
    "argv, module, command",
    [
        ("/bin/nanochat base-train", "scripts.base_train", "nanochat base_train"),
        ("/bin/nanochat dataset local", "nanochat_jax.dataset local", "nanochat dataset local"),
        ("-m nanochat_jax serve", "scripts.serve", "python -m nanochat_jax serve"),
        ("-m scripts.serve", "scripts.serve", "python -m scripts.serve"),
        ("-OO scripts/serve.py", "scripts.serve", "python -m scripts.serve"),
    ],
)
def test_the_way_a_command_was_started_is_known(monkeypatch, argv, module, command):
    monkeypatch.setattr(sys, "orig_argv", ["python", *argv.split()])
    assert cli.invocation(module) == command


def test_without_the_crate_a_command_shows_its_help(tmp_path):
    code = (
        "import sys; sys.modules['nanochat_jax.rustbpe'] = None; "
        "from nanochat_jax.__main__ import main; main()"
    )
    done = python("-c", code, "chat_cli", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--prompt" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "argv, level, named",
    [
        (("os",), "INFO", "base_train"),
        (("report", "bogus"), "INFO", "'bogus'"),
        (("report",), "loud", "NANOCHAT_LOG=loud"),
        (("dataset", "info"), "loud", "NANOCHAT_LOG=loud"),
    ],
)
def test_an_unknown_command_or_log_level_is_one_line(argv, level, named, tmp_path):
    done = nanochat(*argv, cwd=tmp_path, NANOCHAT_LOG=level)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and named in done.stderr

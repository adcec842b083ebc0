"""`nanochat COMMAND`: every script under one name."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_jax.__main__ import MODULES, commands


def python(*argv, cwd):
    root = str(Path(__file__).parents[1])
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=cwd,
                          env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin", "NANOCHAT_BASE_DIR": str(cwd)})


def nanochat(*argv, cwd):
    return python("-m", "nanochat_jax", *argv, cwd=cwd)


def test_every_script_is_a_command():
    scripts = {path.stem for path in (Path(__file__).parents[1] / "scripts").glob("*.py")} - {"__init__"}
    assert set(commands()) == scripts | {"dataset", "report"}


def test_a_command_gets_its_flags_and_gives_its_exit_code(tmp_path):
    done = nanochat("tok-train", "--vocab-size", "many", cwd=tmp_path)
    assert done.returncode == 2 and "expected an integer, got 'many'" in done.stderr
    assert nanochat("report", "reset", cwd=tmp_path).returncode == 0 and (tmp_path / "report").is_dir()


def test_an_unknown_command_is_told_what_there_is(tmp_path):
    done = nanochat("os", cwd=tmp_path)
    assert done.returncode == 2 and "base_train" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["base-train", "dataset local", "report", "tok_eval"])
def test_usage_names_the_command_as_it_was_given(tmp_path, command):
    said = command.replace("-", "_")
    module = ("nanochat_jax." if command.split()[0] in MODULES else "scripts.") + said
    script = tmp_path / "nanochat"  # as pip makes it
    script.write_text("import sys\nfrom nanochat_jax.__main__ import main\nsys.exit(main())\n")
    for how, usage in [((script, *command.split()), f"nanochat {said}"),
                       (("-m", "nanochat_jax", *command.split()), f"python -m nanochat_jax {said}"),
                       (("-m", *module.split()), f"python -m {module}")]:
        done = python(*how, "--help", cwd=tmp_path)
        assert done.stdout.startswith(f"usage: {usage} [-h]"), done.stderr

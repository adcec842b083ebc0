"""`nanochat COMMAND`: every script under one name."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_jax.__main__ import MODULES, commands


def python(*argv, cwd, **environment):
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={
            "PYTHONPATH": root,
            "PATH": "/usr/bin:/bin",
            "NANOCHAT_BASE_DIR": str(cwd),
            **environment,
        },
    )


def nanochat(*argv, cwd, **environment):
    return python("-m", "nanochat_jax", *argv, cwd=cwd, **environment)


def test_every_script_is_a_command():
    scripts = {path.stem for path in (Path(__file__).parents[2] / "scripts").glob("*.py")} - {
        "__init__"
    }
    assert set(commands()) == scripts | {"dataset", "report"}


def test_a_command_gets_its_flags_and_gives_its_exit_code(tmp_path):
    done = nanochat("tok-train", "--vocab-size", "many", cwd=tmp_path)
    assert done.returncode == 2 and "expected an integer, got 'many'" in done.stderr
    assert (
        nanochat("report", "reset", cwd=tmp_path).returncode == 0 and (tmp_path / "report").is_dir()
    )


def test_an_unknown_command_is_told_what_there_is(tmp_path):
    done = nanochat("os", cwd=tmp_path)
    assert done.returncode == 2 and "base_train" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["base-train", "dataset local", "report", "tok_eval"])
def test_usage_names_the_command_as_it_was_given(tmp_path, command):
    said = command.replace("-", "_")
    module = ("nanochat_jax." if command.split()[0] in MODULES else "scripts.") + said
    script = tmp_path / "nanochat"  # as pip makes it
    script.write_text("import sys\nfrom nanochat_jax.__main__ import main\nsys.exit(main())\n")
    for how, usage in [
        ((script, *command.split()), f"nanochat {said}"),
        (("-m", "nanochat_jax", *command.split()), f"python -m nanochat_jax {said}"),
        (("-m", *module.split()), f"python -m {module}"),
    ]:
        done = python(*how, "--help", cwd=tmp_path)
        assert done.stdout.startswith(f"usage: {usage} [-h]"), done.stderr


def test_without_the_crate_a_command_shows_its_help(tmp_path):
    code = "import sys; sys.modules['nanochat_jax.rustbpe'] = None; from nanochat_jax.__main__ import main; main()"
    done = python("-c", code, "chat_cli", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--prompt" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "argv,level,named",
    [
        (("report", "bogus"), "INFO", "'bogus'"),
        (("report",), "loud", "NANOCHAT_LOG=loud"),
        (("dataset", "info"), "loud", "NANOCHAT_LOG=loud"),
    ],
)
def test_a_word_or_a_level_of_logging_that_there_is_not_is_said_in_one_line(
    argv, level, named, tmp_path
):
    done = nanochat(*argv, cwd=tmp_path, NANOCHAT_LOG=level)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and named in done.stderr

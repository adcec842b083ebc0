"""Command lines: both spellings, and mistakes that end in one line and exit code 2."""

import ast
import errno
import importlib.util
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import house
import pytest
from command import run_here

from nanochat_jax import cli
from nanochat_jax.__main__ import commands
from nanochat_jax.cli import flag
from nanochat_jax.errors import UsageError, naming, write_failure
from nanochat_jax.paths import Paths
from nanochat_jax.speedrun.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Config:
    max_chars: int = flag(100, "characters", at_least=1)
    rate: float | None = flag(None, "a rate", short="-r")
    name: str = flag("a", "a name", choices=["a", "b"])
    on: bool = flag(False, "a switch")
    share: float = flag(0.5, "a share", at_least=0)
    every: int = flag(-1, "steps; -1: never", at_least=1, at_most=100, also=-1)

    def __post_init__(self):
        if self.share > 1:
            raise ValueError(f"--share must be at most 1, got {self.share}")


def parse(*argv):
    return cli.parse(Config, argv, prog="test", description="")


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], Config()),
        (["--max-chars", "5"], Config(max_chars=5)),
        (["--max_chars=2e9"], Config(max_chars=2_000_000_000)),
        (["-r", "0.5", "--name", "b"], Config(rate=0.5, name="b")),
        (["--on"], Config(on=True)),
        (["--on=false"], Config(on=False)),
        (["--on", "0"], Config(on=False)),
        (["--", "--max-chars=5", "--on"], Config(max_chars=5, on=True)),
        (["--every", "-1"], Config()),
        (["--every", "1e2"], Config(every=100)),
    ],
)
def test_flags_of_both_spellings(argv, expected):
    assert parse(*argv) == expected


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--max-char", "5"], "--max-char"),
        (["--max-chars", "1.5"], "1.5"),
        (["--max-chars", "x"], "x"),
        (["--name", "c"], "'c'"),
        (["--max-chars", "0"], "--max-chars must be at least 1, got 0"),
        (["--share", "2"], "got 2"),
        (["stray"], "stray"),
        (["--on=maybe"], "maybe"),
        (["--max-chars", "inf"], "inf"),
        (["--max-chars", "1", "--", "--on"], "--on"),
        (["--every", "0"], "--every must be at least 1, or -1, got 0"),
        (["--every", "-2"], "or -1, got -2"),
        (["--every", "101"], "--every must be at most 100, or -1, got 101"),
        (["--share", "nan"], "--share must be at least 0, got nan"),
        (["--share=-inf"], "got -inf"),
    ],
)
def test_mistakes_name_the_value(argv, named):
    with pytest.raises(UsageError, match=named):
        parse(*argv)


@dataclass(frozen=True, kw_only=True)
class Files:
    files: list[str] = cli.arguments("files")
    append: bool = flag(False, "a switch")
    add_all: bool | None = flag(None, "another")
    size: int = flag(3, "a number", at_least=1, at_most=9)


@pytest.mark.parametrize(
    "argv, files, append",
    [
        (["--append", "a.txt"], ["a.txt"], True),
        (["--append", "1", "b"], ["1", "b"], True),
        (["--append", "yes"], ["yes"], True),
        (["a.txt", "--append"], ["a.txt"], True),
        (["--append=false", "a.txt"], ["a.txt"], False),
        (["--append", "--size", "2", "a.txt"], ["a.txt"], True),
        (["--add-all", "a.txt"], ["a.txt"], False),
        (["--append", "--", "--append"], ["--append"], True),
        (["--", "--append"], ["--append"], False),
    ],
)
def test_a_yes_or_no_flag_leaves_the_arguments_after_it(argv, files, append):
    config = cli.parse(Files, argv, prog="test", description=None)
    assert (config.files, config.append) == (files, append)


def test_a_blank_argument_is_refused():
    with pytest.raises(UsageError, match="FILES: expected a value"):
        cli.parse(Files, [""], prog="test", description=None)


def ended(capsys, work):
    """Exit code and standard error of a command."""
    with pytest.raises(SystemExit) as exit:
        cli.guard(work)
    return exit.value.code, capsys.readouterr().err


def raises(error):
    def work():
        raise error

    return work


def full_disk():
    with naming("/a/full"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "work, message",
    [
        (raises(OSError(errno.EROFS, "Read-only", "/a/file")), "/a/file: Read-only"),
        (raises(OSError(errno.EXDEV, "Cross-device", "/a", None, "/b")), "/a -> /b: Cross-device"),
        (raises(OSError(errno.ENOTEMPTY, "Not empty")), "Not empty"),
        (full_disk, "/a/full: No space left on device"),
        (raises(OSError("cannot\n  do it")), "cannot do it"),  # a library's, without a number
        (raises(BrokenPipeError(errno.EPIPE, "Broken pipe")), "Broken pipe"),  # a connection
    ],
)
def test_an_error_of_the_system_names_the_file_and_the_cause_in_one_line(capsys, work, message):
    assert ended(capsys, work) == (2, f"error: {message}\n")


FULL = (
    f'RESOURCE_EXHAUSTED: Error writing "{"/long" * 200}": No space left on device '
    "[OS error 28: ENOSPC] [tensorstore_spec='{...}'] [source locations='a.cc:1']"
)


@pytest.mark.parametrize(
    "error, full",
    [
        (ValueError(FULL), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (ValueError("x" * 1000 + " the cause"), False),
    ],
)
def test_a_failed_write_says_why_to_the_end(error, full):
    outer = RuntimeError("the save failed")
    outer.__cause__ = error
    for wrapped in (error, outer):
        text = write_failure(wrapped)
        assert text.startswith("the disk is full, no space is left") == full and len(text) < 600
    assert write_failure(error).endswith(str(error).partition(" [tensor")[0][-30:])


PIPE = """
import sys
from nanochat_jax import cli
def work():
    for _ in range({lines}):
        print("a line")
cli.guard(work)
"""


def piped(lines, out):
    code = PIPE.format(lines=lines)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, text=True
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "in the middle"])
def test_a_reader_who_leaves_ends_a_command_quietly(lines):
    read, write = os.pipe()
    os.close(read)
    assert piped(lines, write) == (cli.running.EXIT_NO_READER, "")
    os.close(write)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "in the middle"])
def test_output_that_cannot_be_written_is_an_error(lines):
    with open("/dev/full", "w") as full:
        error = "error: standard output: No space left on device\n"
        assert piped(lines, full) == (2, error)


def test_a_home_that_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
    with pytest.raises(UsageError, match="set HOME"):
        Paths.from_env()


@pytest.mark.parametrize("module", commands().values())
def test_every_command_refuses_an_unknown_flag_in_one_line(module, tmp_path):
    ended = run_here(module, "--no-such-flag", base=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.strip().count("\n") == 0 and "--no-such-flag" in ended.stderr


@pytest.mark.parametrize(
    "command, advice",
    [
        ("base_train", "scripts.tok_train"),
        ("tok_train", "nanochat_jax.dataset"),
        ("tok_train --data embedded", "embedded"),
        ("chat_cli -p hi", "scripts.chat_sft"),
        ("mid_train", "scripts.base_train"),
        ("serve -i mid", "scripts.mid_train"),
        ("speedrun --mesh 64x1", "64x1"),
        ("chat_eval -a Arithmetik", "Arithmetik"),  # data sets are looked up before the model
        ("chat_sft --mixture no.jsonl", "no.jsonl"),
    ],
)
def test_a_missing_input_is_one_line_with_what_to_run(command, advice, tmp_path):
    script, *argv = command.split()
    ended = run_here(f"scripts.{script}", *argv, base=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr and advice in ended.stderr.strip().splitlines()[-1]


RUN = """
import gc
from dataclasses import make_dataclass
from nanochat_jax import cli
def interrupt(*_):
    gc.callbacks.clear()
    raise KeyboardInterrupt
def main(config):
    {how}
cli.run(main, make_dataclass("Config", []), prog="test", description="")
"""


@pytest.mark.parametrize(
    "code",
    [
        RUN.format(how="interrupt()"),
        RUN.format(
            how="gc.callbacks.append(interrupt); gc.collect(); __import__('time').sleep(60)"
        ),
        "import sys; sys.argv[0] = '-m'; import scripts; raise KeyboardInterrupt",
    ],
    ids=["anywhere", "in a callback of the collector", "while it imports"],
)
def test_an_interrupt_ends_a_script_without_a_traceback(code):
    command, root = [sys.executable, "-c", code], Path(__file__).parents[1]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=root)
    assert ended.returncode in (130, -signal.SIGINT) and ended.stderr == "stopped\n"


def test_messages_of_the_package_name_settings_and_commands_print_flags(capsys):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        batch_size: int = flag(1, "rows", at_least=1, at_most=10)
        remat: str = flag("none", "what is recomputed")

    def main(config):
        logging.getLogger("nanochat_jax").warning("`batch_size` is %d", config.batch_size)
        raise UsageError("halve `batch_size`, or set `remat=block`; `pip install x` is no setting")

    with pytest.raises(SystemExit):
        cli.run(main, Config, prog="scripts.x", description="d", argv=["--batch-size", "2"])
    assert capsys.readouterr().err.splitlines() == [
        "--batch-size is 2",
        "error: halve --batch-size, or set --remat block; `pip install x` is no setting",
    ]


@pytest.mark.parametrize("import_first", [False, True])
def test_a_current_directory_that_is_gone_is_named(tmp_path, import_first):
    code = "import os; os.chdir({0!r}); os.rmdir({0!r}); {1}".format(
        str(tmp_path / "gone"),
        "import sys; sys.argv[0] = '-m'; import scripts; os.getcwd()"
        if import_first
        else "from nanochat_jax import cli; cli.guard(os.getcwd)",
    )
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 2
    assert done.stderr == "error: the current directory no longer exists: change to another one\n"


def test_no_module_uses_the_text_of_its_docstring():
    """`python -OO` removes docstrings; `cli.run` takes None."""
    wrong = [
        path
        for path in house.python_files(*house.PRODUCT)
        for node in ast.walk(house.tree_of(path))
        if isinstance(node, ast.Attribute | ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "__doc__"
    ]
    assert not wrong


@pytest.mark.parametrize("platform", ["cuda", "CPU"])
def test_a_missing_platform_is_named_with_its_variable(platform, monkeypatch):
    if platform == "cuda" and importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("JAX with CUDA")
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    with pytest.raises(UsageError, match=f"JAX_PLATFORMS={platform}: JAX finds no such platform"):
        Machine.probe()


def test_a_missing_device_type_is_named_with_its_flag():
    with pytest.raises(UsageError, match="`device_type=rocm`: JAX finds no such device here"):
        Machine.probe("rocm")


def test_an_interrupt_while_a_script_imports_ends_it_without_a_traceback():
    # as under `python -m scripts.NAME`
    code = "import sys; sys.argv[0] = '-m'; import scripts; raise KeyboardInterrupt"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert ended.returncode in (130, -signal.SIGINT) and ended.stderr == "stopped\n"

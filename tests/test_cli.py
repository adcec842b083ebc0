"""Command lines: both spellings, upstream's `--name=value`, and mistakes that end in one line and exit code 2."""

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat_jax import cli
from nanochat_jax.cli import UsageError, flag
from nanochat_jax.metrics import start_wandb


@dataclass(frozen=True, kw_only=True)
class Config:
    max_chars: int = flag(100, "characters", at_least=1)
    rate: float | None = flag(None, "a rate", short="-r")
    name: str = flag("a", "a name", choices=["a", "b"])
    on: bool = flag(False, "a switch")
    share: float = flag(0.5, "a share")

    def __post_init__(self):
        if self.share > 1:
            raise ValueError(f"--share must be at most 1, got {self.share}")


def parse(*argv):
    return cli.parse(Config, argv, prog="test", description="")


@pytest.mark.parametrize("argv, expected", [
    ([], Config()),
    (["--max-chars", "5"], Config(max_chars=5)),
    (["--max_chars=2e9"], Config(max_chars=2_000_000_000)),
    (["-r", "0.5", "--name", "b"], Config(rate=0.5, name="b")),
    (["--on"], Config(on=True)),
    (["--on=false"], Config(on=False)),
])
def test_flags_of_both_spellings(argv, expected):
    assert parse(*argv) == expected


@pytest.mark.parametrize("argv, named", [
    (["--max-char", "5"], "--max-char"), (["--max-chars", "1.5"], "1.5"), (["--max-chars", "x"], "x"),
    (["--name", "c"], "'c'"), (["--max-chars", "0"], "--max-chars must be at least 1, got 0"),
    (["--share", "2"], "got 2"), (["stray"], "stray"), (["--on=maybe"], "maybe"),
    (["--max-chars", "inf"], "inf"),
])
def test_mistakes_name_the_value(argv, named):
    with pytest.raises(UsageError, match=named):
        parse(*argv)


SCRIPTS = ["base_train", "base_loss", "base_eval", "mid_train", "chat_sft", "chat_eval", "chat_rl", "chat_cli", "serve",
           "tok_train", "tok_eval", "speedrun"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_refuses_an_unknown_flag_in_one_line(script, tmp_path):
    ended = run_script(script, "--no-such-flag", base=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.strip().count("\n") == 0 and "--no-such-flag" in ended.stderr


@pytest.mark.parametrize("script, argv, advice", [
    ("base_train", [], "scripts.tok_train"), ("tok_train", [], "nanochat_jax.dataset"),
    ("chat_cli", ["-p", "hi"], "scripts.chat_sft"), ("mid_train", [], "scripts.base_train"),
    ("serve", ["-i", "mid"], "scripts.mid_train"), ("speedrun", ["--mesh", "64x1"], "64x1"),
    # What is named is looked for before the model, which is missing here too.
    ("chat_eval", ["-a", "Arithmetik"], "Arithmetik"), ("chat_eval", ["--task-file", "no.jsonl"], "no.jsonl"),
    ("mid_train", ["--mixture", "SmallTalk"], "SmallTalk"), ("chat_sft", ["--mixture", "no.jsonl"], "no.jsonl"),
    ("chat_rl", ["--task", "GSM9K"], "GSM9K"),
])
def test_what_is_missing_is_said_in_one_line_with_what_to_run(script, argv, advice, tmp_path):
    ended = run_script(script, *argv, base=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr and advice in ended.stderr.strip().splitlines()[-1]


def test_a_base_directory_that_cannot_be_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    ended = run_script("tok_train", "--data", "embedded", base=tmp_path / "file")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and str(tmp_path / "file") in ended.stderr
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda config: (tmp_path / "file" / "below").mkdir(), Config, prog="test", description="")
    assert exit.value.code == 2


INTERRUPTED = """
import gc, time
from dataclasses import dataclass
from nanochat_jax import cli

def main(config):
    def interrupt():
        raise KeyboardInterrupt
    {how}
    time.sleep(60)

@dataclass
class Config:
    pass

cli.run(main, Config, prog="test", description="")
"""


@pytest.mark.parametrize("how", [
    "interrupt()", "gc.callbacks.append(lambda *_: (gc.callbacks.clear(), interrupt()))\n    gc.collect()",
], ids=["at any place", "in a callback of the collector"])
def test_an_interrupt_ends_a_script_without_a_traceback(how):
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED.format(how=how)], capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stderr) == (130, "stopped\n")


def test_an_interrupt_while_a_script_imports_ends_it_without_a_traceback():
    code = "import sys; sys.argv[0] = '-m'; import scripts; raise KeyboardInterrupt"  # as under `python -m scripts.NAME`
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ended.returncode in (130, -signal.SIGINT) and ended.stderr == "stopped\n"


def test_a_bucket_is_not_taken_for_a_directory(tmp_path):
    ended = run_script("base_loss", base="gs://bucket/base")
    assert ended.returncode == 2 and "gs://bucket/base" in ended.stderr


def run_script(script, *argv, base):
    import os

    env = os.environ | {"NANOCHAT_BASE_DIR": str(base), "XLA_FLAGS": ""}
    return subprocess.run([sys.executable, "-m", f"scripts.{script}", *argv], capture_output=True, text=True, env=env)


def test_a_run_on_wandb_without_wandb_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="--run x .*pip install wandb"):
        start_wandb("x", "nanochat", {})
    assert start_wandb("dummy", "nanochat", {}) is None

"""Which stages run again: finished ones never, those that depend on a change always."""

import dataclasses
import re
import time

import pytest

from nanochat_jax.errors import UsageError
from nanochat_jax.files import lock_file
from nanochat_jax.paths import Paths
from nanochat_jax.speedrun import runner
from nanochat_jax.speedrun.machine import Machine
from nanochat_jax.speedrun.plan import SpeedrunConfig
from nanochat_jax.speedrun.runner import Record, run_stages
from nanochat_jax.speedrun.stages import Stage, stage_keys
from scripts.speedrun import main

LINE = [
    Stage(name="data", module="m.data", produces=True),
    Stage(
        name="base_train",
        module="m.base",
        args=("--depth", "4"),
        placement=("--mesh", "1x1"),
        produces=True,
        checkpoints="base_checkpoints/d4",
    ),
    Stage(name="base_loss", module="m.loss"),
    Stage(name="mid_train", module="m.mid", produces=True, checkpoints="mid_checkpoints/d4"),
]
ALL = [("data",), ("base", "--resume"), ("loss",), ("mid", "--resume")]


@pytest.fixture
def line(tmp_path, monkeypatch):
    """Runs stages and returns the commands that were started; `fail` names one that is killed."""

    def go(stages=LINE, fail=None, fresh=False):
        calls = []

        def call(command):
            module = command[2]
            flags = [flag for flag in command if flag in ("--resume", "--fresh")]
            calls.append((module.removeprefix("m."), *flags))
            return 9 if module == fail else 0

        monkeypatch.setattr(runner, "call", call)
        path = tmp_path / "speedrun.json"
        saved = path.exists() and not fresh
        record = Record.open(Paths(tmp_path), fresh=False) if saved else Record(path)
        code = run_stages(stages, record)
        return code, [call for call in calls if call[0] != "nanochat_jax.report"]

    return go


def changed(stage, **fields):
    return [dataclasses.replace(each, **fields) if each.name == stage else each for each in LINE]


@pytest.mark.parametrize(
    ("again", "expected"),
    [
        ({}, []),
        ({"fresh": True}, ALL),
        ({"stages": changed("base_train", args=("--depth", "5"))}, ALL[1:]),
        # the mesh is no part of the result; nothing builds on an evaluation
        ({"stages": changed("base_train", placement=("--mesh", "8x1"))}, []),
        ({"stages": changed("base_loss", args=("--x",))}, [("loss",)]),
    ],
    ids=["finished", "fresh", "depth", "mesh", "evaluation"],
)
def test_a_second_run_runs_what_depends_on_a_change(line, again, expected):
    assert line() == (0, ALL)
    assert line(**again) == (0, expected)
    assert not set(stage_keys(LINE, "a").values()) & set(stage_keys(LINE, "b").values())


def test_a_killed_run_continues_in_the_middle_of_the_stage(line):
    assert line(fail="m.base") == (9, ALL[:2])
    assert line() == (0, ALL[1:])


def test_a_stage_that_other_settings_overwrote_is_not_finished(line):
    line()
    assert line(changed("base_train", args=("--depth", "4", "--steps", "2")), "m.base")[0] == 9
    # what was built on the first model still exists, and has these settings
    assert line() == (0, ALL[1:2])


def test_steps_of_other_settings_are_moved_before_a_stage_starts(line, tmp_path):
    step = tmp_path / "base_checkpoints" / "d4" / "100"
    step.mkdir(parents=True)
    assert line(fail="m.base") == (9, ALL[:2])
    assert not step.exists()
    assert (step.parent / ".replaced-0" / "100").exists()  # but nothing is lost
    step.mkdir(parents=True)  # its own
    assert line() == (0, ALL[1:]) and step.exists()


def test_a_base_directory_has_one_speedrun_and_its_outputs_are_checked_first(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    cpu = Machine(platform="cpu", kind="cpu", count=1, peak_flops=None)
    monkeypatch.setattr(Machine, "probe", lambda device_type: cpu)
    monkeypatch.setattr(runner, "call", lambda command: pytest.fail("a stage started"))
    with (
        lock_file(tmp_path / "base" / ".speedrun.lock", "", ""),
        pytest.raises(UsageError, match="the speedrun of .* in use"),
    ):
        main(SpeedrunConfig())
    (tmp_path / "base" / "report").rmdir()
    (tmp_path / "base" / "report").touch()
    with pytest.raises(UsageError, match="report is a file where a directory is needed"):
        main(SpeedrunConfig())


def test_fresh_keeps_a_file_that_is_no_record(tmp_path):
    (tmp_path / "speedrun.json").write_text("mine")
    with pytest.raises(UsageError, match="is not the record of a run"):
        Record.open(Paths(tmp_path), fresh=False)
    Record.open(Paths(tmp_path), fresh=True).write()
    assert (tmp_path / "speedrun.old-1.json").read_text() == "mine"
    assert Record.open(Paths(tmp_path), fresh=False).finished == {}


BACKGROUND = """
import pathlib, sys, time
time.sleep(0.3)
print("it came")
pathlib.Path("rest").touch()
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_background_stage_runs_beside_others_until_one_waits_for_it(
    tmp_path, monkeypatch, capfd, code
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "background.py").write_text(BACKGROUND)
    calls = []

    def call(command):
        calls.append((command[2], (tmp_path / "rest").exists()))
        return 0

    monkeypatch.setattr(runner, "call", call)
    stages = [
        Stage(name="data", module="m.data", produces=True),
        Stage(name="rest", module="background", args=(str(code),), background=True),
        Stage(name="tokenizer", module="m.tok", produces=True),
        Stage(name="train", module="m.train", waits_for="rest"),
    ]
    record = Record(tmp_path / "speedrun.json")
    assert run_stages(stages, record) == code
    done = [("m.data", False), ("m.tok", False), *([("m.train", True)] if code == 0 else [])]
    assert calls[1:] == done
    err = capfd.readouterr().err
    if code:
        assert "it came" in err and "rest ended with exit code 3" in err
        assert "rest" not in record.finished
    else:
        assert run_stages(stages, record) == 0 and calls[1:] == done  # all are finished


def test_a_failure_of_another_stage_stops_the_background(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "background.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(runner, "call", lambda command: 5 if command[2] == "m.tok" else 0)
    stages = [
        Stage(name="rest", module="background", background=True),
        Stage(name="tokenizer", module="m.tok"),
    ]
    start = time.monotonic()
    assert run_stages(stages, Record(tmp_path / "speedrun.json")) == 5
    assert time.monotonic() - start < 30


def test_the_estimate_of_the_time_left_follows_the_finished_stages(tmp_path, monkeypatch, capsys):
    clock = [0.0]

    def call(command):
        clock[0] += {"m.slow": 300.0, "m.quick": 1.0}.get(command[2], 0.0)
        return 0

    monkeypatch.setattr(runner, "call", call)
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    seconds = {"quick": 10, "slow": 100, "last": 100}
    stages = [Stage(name=name, module=f"m.{name}", seconds=s) for name, s in seconds.items()]
    assert run_stages(stages, Record(tmp_path / "speedrun.json")) == 0
    # 100 s of plan: 191 s by now
    assert re.findall(r"about (\S+) left", capsys.readouterr().err) == ["3:30", "3:11", "3:11"]

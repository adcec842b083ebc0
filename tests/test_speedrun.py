"""Which stages run again: a finished one never, one that depends on a change always; and the dial's plan."""

import dataclasses

import pytest

from nanochat_jax import speedrun
from nanochat_jax.speedrun import Machine, Record, Stage, run_stages, stage_keys
from scripts.speedrun import STAGES, SpeedrunConfig, plan_stages

LINE = [
    Stage(name="data", module="m.data", produces=True),
    Stage(name="base_train", module="m.base", args=("--depth", "4"), placement=("--mesh", "1x1"), produces=True, resumable=True),
    Stage(name="base_loss", module="m.loss"),
    Stage(name="mid_train", module="m.mid", produces=True, resumable=True),
]


@pytest.fixture
def line(tmp_path, monkeypatch):
    """Runs stages of the line and gives the commands that were started; `fail` names one that is killed."""

    def go(stages=LINE, fail=None, fresh=False):
        calls = []

        def call(command):
            module = command[2]
            calls.append((module.removeprefix("m."), *(flag for flag in command if flag in ("--resume", "--fresh"))))
            return 9 if module == fail else 0

        monkeypatch.setattr(speedrun, "_call", call)
        path = tmp_path / "speedrun.json"
        record = Record(path) if fresh or not path.exists() else Record.open(Paths(tmp_path), fresh=False)
        code = run_stages(stages, record)
        return code, [call for call in calls if call[0] != "nanochat_jax.report"]

    from nanochat_jax.paths import Paths

    return go


ALL = [("data",), ("base", "--fresh"), ("loss",), ("mid", "--fresh")]


def test_a_second_run_skips_what_is_finished(line):
    assert line() == (0, ALL)
    assert line() == (0, [])


def test_a_killed_run_goes_on_in_the_middle_of_the_stage(line):
    assert line(fail="m.base") == (9, ALL[:2])
    assert line() == (0, [("base", "--resume"), ("loss",), ("mid", "--fresh")])


def test_a_changed_setting_runs_again_what_depends_on_it(line):
    line()
    deeper = [dataclasses.replace(stage, args=("--depth", "5")) if stage.name == "base_train" else stage for stage in LINE]
    assert line(deeper) == (0, ALL[1:])


def test_an_evaluation_is_built_upon_by_nothing_and_the_mesh_is_no_setting(line):
    line()
    other = [dataclasses.replace(LINE[1], placement=("--mesh", "8x1")), dataclasses.replace(LINE[2], args=("--x",)), LINE[3]]
    assert line([LINE[0], *other]) == (0, [("loss",)])


def test_fresh_runs_everything(line):
    line()
    assert line(fresh=True) == (0, ALL)


def test_keys_differ_between_runs():
    assert not set(stage_keys(LINE, "a").values()) & set(stage_keys(LINE, "b").values())


CPU = Machine(platform="cpu", kind="cpu", count=1, peak_flops=None)
GPUS = Machine(platform="gpu", kind="NVIDIA H100", count=8, peak_flops=989e12)


def test_the_line_of_a_gpu_node_is_the_dial_on_real_data():
    stages, _ = plan_stages(SpeedrunConfig(mesh="8x1", with_rl=True), GPUS, "dummy")
    assert [stage.name for stage in stages] == list(STAGES)
    base = next(stage for stage in stages if stage.name == "base_train")
    assert "climbmix" in base.args and "896.5M parameters" in base.note and "4,980 steps" in base.note


def test_without_an_accelerator_the_line_needs_no_network():
    stages, _ = plan_stages(SpeedrunConfig(skip="base_eval,report"), CPU, "dummy")
    assert [stage.name for stage in stages] == [
        name for name in STAGES if name not in ("base_eval", "report", "chat_rl", "chat_eval_rl")]
    assert stages[0].args == ("embedded",)


def test_mistakes_are_refused_with_the_value():
    for flags in (dict(skip="base"), dict(resume=True, fresh=True), dict(depth=0)):
        with pytest.raises(ValueError, match="|".join(str(value) for value in flags.values()) + "|give one"):
            SpeedrunConfig(**flags)

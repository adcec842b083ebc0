"""Which stages run again: a finished one never, one that depends on a change always; and the
dial's plan.
"""

import dataclasses
import re
import time

import pytest

from nanochat_jax import cli, pipeline
from nanochat_jax.cli import parse
from nanochat_jax.errors import UsageError
from nanochat_jax.files import lock_file
from nanochat_jax.paths import Paths
from nanochat_jax.pipeline import Machine, Record, Stage, run_stages, stage_keys
from nanochat_jax.train.pretrain import BaseTrainConfig
from nanochat_jax.train.rl import ChatRLConfig
from nanochat_jax.train.stages import ChatSFTConfig, MidTrainConfig
from scripts.base_loss import BaseLossConfig
from scripts.speedrun import STAGES, SpeedrunConfig, main, next_commands, plan_stages

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


@pytest.fixture
def line(tmp_path, monkeypatch):
    """Runs stages of the line and gives the commands that were started; `fail` names one that is
    killed.
    """

    def go(stages=LINE, fail=None, fresh=False):
        calls = []

        def call(command):
            module = command[2]
            calls.append(
                (
                    module.removeprefix("m."),
                    *(flag for flag in command if flag in ("--resume", "--fresh")),
                )
            )
            return 9 if module == fail else 0

        monkeypatch.setattr(pipeline, "_call", call)
        path = tmp_path / "speedrun.json"
        record = (
            Record(path)
            if fresh or not path.exists()
            else Record.open(Paths(tmp_path), fresh=False)
        )
        code = run_stages(stages, record)
        return code, [call for call in calls if call[0] != "nanochat_jax.report"]

    return go


ALL = [("data",), ("base", "--resume"), ("loss",), ("mid", "--resume")]


def test_a_second_run_skips_what_is_finished(line):
    assert line() == (0, ALL)
    assert line() == (0, [])


def test_a_killed_run_goes_on_in_the_middle_of_the_stage(line):
    assert line(fail="m.base") == (9, ALL[:2])
    assert line() == (0, ALL[1:])


def test_a_stage_that_other_settings_overwrote_is_not_finished(line):
    line()
    smoke = [
        LINE[0],
        dataclasses.replace(LINE[1], args=("--depth", "4", "--steps", "2")),
        *LINE[2:],
    ]
    assert line(smoke, fail="m.base")[0] == 9
    # what was built on the first model is still there, and of these settings
    assert line() == (0, ALL[1:2])


def test_steps_of_other_settings_are_gone_before_a_stage_has_begun(line, tmp_path):
    """However early it is killed, `--resume` finds its own steps only."""
    step = tmp_path / "base_checkpoints" / "d4" / "100"
    step.mkdir(parents=True)
    assert line(fail="m.base") == (9, ALL[:2])
    assert not step.exists()
    assert (step.parent / ".replaced-0" / "100").exists()  # but nothing is lost
    step.mkdir(parents=True)  # its own
    assert line() == (0, ALL[1:]) and step.exists()


def test_a_changed_setting_runs_again_what_depends_on_it(line):
    line()
    deeper = [
        dataclasses.replace(stage, args=("--depth", "5")) if stage.name == "base_train" else stage
        for stage in LINE
    ]
    assert line(deeper) == (0, ALL[1:])


def test_an_evaluation_is_built_upon_by_nothing_and_the_mesh_is_no_setting(line):
    line()
    other = [
        dataclasses.replace(LINE[1], placement=("--mesh", "8x1")),
        dataclasses.replace(LINE[2], args=("--x",)),
        LINE[3],
    ]
    assert line([LINE[0], *other]) == (0, [("loss",)])


def test_fresh_runs_everything(line):
    line()
    assert line(fresh=True) == (0, ALL)


def test_keys_differ_between_runs():
    assert not set(stage_keys(LINE, "a").values()) & set(stage_keys(LINE, "b").values())


def test_the_time_that_is_left_follows_the_stages_that_ended(tmp_path, monkeypatch, capsys):
    clock = [0.0]

    def call(command):
        clock[0] += {"m.slow": 300.0, "m.quick": 1.0}.get(command[2], 0.0)
        return 0

    monkeypatch.setattr(pipeline, "_call", call)
    monkeypatch.setattr(pipeline.time, "monotonic", lambda: clock[0])
    stages = [
        Stage(name="quick", module="m.quick", seconds=10),
        Stage(name="slow", module="m.slow", seconds=100),
        Stage(name="last", module="m.last", seconds=100),
    ]
    assert run_stages(stages, Record(tmp_path / "speedrun.json")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    # 100 s of plan: 191 s by now
    assert re.findall(r"about (\S+) left", " ".join(said)) == ["3:30", "3:11", "3:11"]


def test_the_end_names_the_commands_that_talk_to_the_model(tmp_path, monkeypatch):
    for tag in ("d4", "d20"):
        (tmp_path / f"chatsft_checkpoints/{tag}/60/params").mkdir(parents=True)
    (tmp_path / "chatrl_checkpoints/d4/36/params").mkdir(parents=True)
    paths = Paths(tmp_path)
    monkeypatch.setattr(cli.sys, "orig_argv", [".venv/bin/python", "-m", "scripts.speedrun"])
    dial, preset = (list(planned(CPU, mesh="auto", depth=depth).values()) for depth in (20, 4))
    assert next_commands(dial, paths).splitlines() == [
        "talk to the model:  .venv/bin/python -m scripts.chat_cli",
        "or in the browser:  .venv/bin/python -m scripts.serve",
    ]
    assert "scripts.serve -g d4" in next_commands(preset, paths)
    monkeypatch.setattr(cli.sys, "orig_argv", ["/usr/bin/python3", "/usr/bin/nanochat", "speedrun"])
    with_rl = list(planned(CPU, mesh="auto", with_rl=True).values())
    assert next_commands(with_rl, paths).endswith("nanochat serve -i rl")
    assert next_commands(preset[:4], paths) == ""


CPU = Machine(platform="cpu", kind="cpu", count=1, peak_flops=None)
GPUS = Machine(platform="gpu", kind="NVIDIA H100", count=8, peak_flops=989e12)


def test_the_line_of_a_gpu_node_is_the_dial_on_real_data():
    stages, _ = plan_stages(SpeedrunConfig(mesh="8x1", with_rl=True), GPUS, "dummy", {})
    assert [stage.name for stage in stages] == list(STAGES)
    base = next(stage for stage in stages if stage.name == "base_train")
    assert (
        "climbmix" in base.args and "896.5M parameters" in base.note and "4,980 steps" in base.note
    )


def test_without_an_accelerator_the_line_needs_no_network():
    stages, _ = plan_stages(SpeedrunConfig(skip="base_eval,report"), CPU, "dummy", {"climbmix": 8})
    assert [stage.name for stage in stages] == [
        name
        for name in STAGES
        if name not in ("data_rest", "base_eval", "report", "chat_rl", "chat_eval_rl")
    ]
    assert stages[0].args == ("embedded",)


@pytest.mark.parametrize(
    ("on_disk", "said"),
    [
        ({}, []),
        ({"embedded": 4}, []),
        (
            {"fineweb": 3, "embedded": 4},
            ["base_data (3 training shards) not used", "--data fineweb trains on it"],
        ),
        (
            {"custom": 1, "climbmix": 8},
            [
                "base_data_custom (1 training shards) and base_data_climbmix (8 training shards) "
                "not used",
                "--data custom trains on it",
            ],
        ),
    ],
)
def test_without_an_accelerator_shards_on_disk_are_named_and_how_to_train_on_them(on_disk, said):
    _, title = plan_stages(SpeedrunConfig(), CPU, "dummy", on_disk)
    assert all(words in title for words in said) and ("not used" in title) == bool(said)
    for name in on_disk:
        assert (
            plan_stages(SpeedrunConfig(data=name), CPU, "dummy", on_disk)[1]
            == f"speedrun: d4 on {name}"
        )


def test_one_speedrun_of_a_base_directory_and_its_outputs_are_checked_first(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Machine, "probe", lambda device_type: CPU)
    monkeypatch.setattr(pipeline, "_call", lambda command: pytest.fail("a stage began"))
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
    with pytest.raises(UsageError, match="is not a record of a run"):
        Record.open(Paths(tmp_path), fresh=False)
    Record.open(Paths(tmp_path), fresh=True).write()
    assert (tmp_path / "speedrun.old-1.json").read_text() == "mine"
    assert Record.open(Paths(tmp_path), fresh=False).finished == {}


def test_what_the_depth_needs_is_fetched_and_explained():
    """d20 trains on 5.22B tokens: 135 shards of 250M characters, by 4.8 characters a token and a
    third that is cut.
    """
    stages, _ = plan_stages(SpeedrunConfig(mesh="8x1"), GPUS, "dummy", {"climbmix": 40})
    first, rest, *others = stages
    assert first.args == ("--dataset", "climbmix", "-n", "10") and not first.background
    assert rest.args == ("--dataset", "climbmix", "-n", "136") and rest.background
    assert (
        "first 10 of 136 training shards" in first.note
        and "5.22B tokens" in first.note
        and "40 are there" in first.note
    )
    assert [stage.name for stage in others if stage.waits_for == "data_rest"] == ["base_train"]
    small, _ = plan_stages(SpeedrunConfig(mesh="8x1", depth=4), GPUS, "dummy", {})
    assert [stage.name for stage in small[:2]] == ["data", "tok_train"]


@pytest.mark.parametrize(
    ("on_disk", "data"),
    [
        ({}, "climbmix"),
        ({"fineweb": 3}, "fineweb"),
        ({"fineweb": 3, "climbmix": 1}, "climbmix"),
        ({"custom": 1, "fineweb": 3}, "custom"),
    ],
)
def test_the_corpus_on_disk_is_the_default(on_disk, data):
    stages, title = plan_stages(SpeedrunConfig(), GPUS, "dummy", on_disk)
    assert title == f"speedrun: d20 on {data}"
    assert (stages[0].name == "data") is (data != "custom")
    skipped, _ = plan_stages(SpeedrunConfig(skip="data"), GPUS, "dummy", on_disk)
    assert skipped[0].name == "tok_train"


def test_a_corpus_of_ones_own_must_be_there():
    with pytest.raises(UsageError, match="make one with `python -m nanochat_jax.dataset hf`"):
        plan_stages(SpeedrunConfig(data="custom"), GPUS, "dummy", {})


BACKGROUND = """
import pathlib, sys, time
time.sleep(0.3)
print("it came")
pathlib.Path("rest").touch()
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_stage_in_the_background_runs_beside_others_and_is_waited_for(
    tmp_path, monkeypatch, capfd, code
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "background.py").write_text(BACKGROUND)
    seen = []
    monkeypatch.setattr(
        pipeline,
        "_call",
        lambda command: seen.append((command[2], (tmp_path / "rest").exists())) or 0,
    )
    line = [
        Stage(name="data", module="m.data", produces=True),
        Stage(name="rest", module="background", args=(str(code),), background=True),
        Stage(name="tokenizer", module="m.tok", produces=True),
        Stage(name="train", module="m.train", waits_for="rest"),
    ]
    record = Record(tmp_path / "speedrun.json")
    assert run_stages(line, record) == code
    done = [("m.data", False), ("m.tok", False), *([("m.train", True)] if code == 0 else [])]
    assert seen[1:] == done
    err = capfd.readouterr().err
    if code:
        assert (
            "it came" in err
            and "rest ended with exit code 3" in err
            and "rest" not in record.finished
        )
    else:
        assert run_stages(line, record) == 0 and seen[1:] == done  # the next run does nothing again


def test_a_failure_elsewhere_stops_the_background(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "background.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(pipeline, "_call", lambda command: 5 if command[2] == "m.tok" else 0)
    line = [
        Stage(name="rest", module="background", background=True),
        Stage(name="tokenizer", module="m.tok"),
    ]
    start = time.monotonic()
    assert run_stages(line, Record(tmp_path / "speedrun.json")) == 5
    assert time.monotonic() - start < 30


def test_mistakes_are_refused_with_the_value():
    for flags in (
        dict(skip="base"),
        dict(resume=True, fresh=True),
        dict(depth=0),
        dict(device_batch_size=0),
    ):
        with pytest.raises(
            UsageError, match="|".join(str(value) for value in flags.values()) + "|give one"
        ):
            parse(
                SpeedrunConfig,
                [f"--{name}={value}" for name, value in flags.items()],
                prog="speedrun",
                description="",
            )


TRAINING = ("base_train", "mid_train", "chat_sft")


def planned(machine=GPUS, **flags):
    stages, _ = plan_stages(SpeedrunConfig(**{"mesh": "8x1"} | flags), machine, "dummy", {})
    return {stage.name: stage for stage in stages}


def test_what_saves_memory_reaches_every_stage_that_trains():
    """Each stage's own parser understands what it is given, and nothing has to run again for it."""
    given = planned(depth=32, device_batch_size=2, remat="block", fsdp=True, with_rl=True)
    parsed = {}
    for name, config_type in zip(
        (*TRAINING, "chat_rl"),
        (BaseTrainConfig, MidTrainConfig, ChatSFTConfig, ChatRLConfig),
        strict=True,
    ):
        parsed[name] = cli.parse(config_type, given[name].command()[3:], prog=name, description="")
        assert (parsed[name].remat, parsed[name].fsdp) == ("block", True)
    assert [parsed[name].device_batch_size for name in TRAINING] == [2, 2, 2]
    assert parsed["chat_rl"].device_batch_size == ChatRLConfig.device_batch_size
    plain = planned(depth=32, with_rl=True)
    assert stage_keys(given.values(), "a") == stage_keys(plain.values(), "a")
    auto = planned(depth=32, device_batch_size="auto")
    assert all(("--device-batch-size", "auto") == auto[name].placement[2:4] for name in TRAINING)
    # does not know `auto`
    cli.parse(BaseLossConfig, auto["base_loss"].command()[3:], prog="base_loss", description="")


def test_the_plan_says_how_long_each_stage_is():
    """From the mixtures of the dial: a pass over 848K conversations, and 22.4K in steps of 32 rows
    of 2,048 tokens.
    """
    dial = planned()
    # of 2^20 tokens
    assert "848,000 conversations, about 400M tokens in 381 steps" in dial["mid_train"].note
    assert "22,400 conversations, about 12M tokens in 183 steps" in dial["chat_sft"].note
    preset = planned(CPU, mesh="auto")
    assert (
        "1.0M tokens in 250 steps" in preset["mid_train"].note
        and "in 60 steps" in preset["chat_sft"].note
    )
    smoke = planned(smoke=True, data="climbmix")
    assert "in 4 steps" in smoke["mid_train"].note
    assert "16k tokens in 4 steps" in planned(CPU, mesh="auto", smoke=True)["mid_train"].note


def gibibytes(stage):
    return float(re.search(r"about ([\d.]+) GiB per device", stage.note)[1])


def test_the_memory_of_the_plan():
    """Not less than the compiled plan (tpu/plans), nor much more: d20 on 16 chips, 16 rows each,
    takes 10.2 GiB.
    """
    v5e = Machine(platform="tpu", kind="TPU v5e", count=16, peak_flops=197e12)
    assert (
        10.2
        < gibibytes(
            planned(v5e, device_batch_size=16, remat="block", fsdp=True, mesh="16x1")["base_train"]
        )
        < 13
    )
    settings = [
        dict(device_batch_size=8),
        dict(device_batch_size=4),
        dict(device_batch_size=4, fsdp=True),
        dict(device_batch_size=4, fsdp=True, remat="block"),
        dict(device_batch_size=4, fsdp=True, remat="full"),
    ]
    needed = [gibibytes(planned(depth=32, **flags)["base_train"]) for flags in settings]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == len(needed)
    assert "as many rows per device as fit" in planned(device_batch_size="auto")["base_train"].note


def test_the_plan_names_the_stages_whose_time_is_unknown(capsys):
    pipeline.print_plan(list(planned(CPU, mesh="auto").values()), CPU, "")
    assert "time in all:" in capsys.readouterr().out
    pipeline.print_plan(list(planned().values()), GPUS, "")
    assert (
        "time in all, without data, base_loss, base_eval, chat_eval_mid, chat_eval_sft:"
        in capsys.readouterr().out
    )

"""Every command's flags: numbers have a range, names are checked, other values are refused."""

import dataclasses
import importlib
import sys
import typing
from pathlib import Path

import pytest

from nanochat_jax import cli, dataset
from nanochat_jax.__main__ import commands
from nanochat_jax.devices import DeviceFlags
from nanochat_jax.errors import UsageError
from nanochat_jax.eval.base_model import BaseEvalConfig
from nanochat_jax.eval.chat_model import ChatEvalConfig
from nanochat_jax.serve.chat_request import BadRequest, SamplingFields, check
from nanochat_jax.train.pretrain import BaseTrainConfig
from nanochat_jax.train.rl import ChatRLConfig
from nanochat_jax.train.stages import ChatSFTConfig, MidTrainConfig
from scripts.chat_cli import Config as ChatConfig
from scripts.infer_bench import Config as BenchConfig
from scripts.serve import Config as ServeConfig
from scripts.speedrun import SpeedrunConfig
from scripts.tpu_plan import PlanConfig


def flag_types():
    """The flag dataclasses of all commands, by module and name."""
    sys.path.append(str(Path(__file__).parents[2] / "docs"))
    return {
        f"{value.__module__}.{value.__qualname__}": value
        for name in (*commands().values(), "tpu.plan", "tour")
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
        if any("help" in field.metadata for field in dataclasses.fields(value))
    }


FLAG_TYPES = flag_types()


def parse(config_type, *argv):
    return cli.parse(config_type, argv, prog="test", description=None)


def flags_of(name):
    """(field, its types) of each flag of a dataclass, without positional arguments."""
    hints = typing.get_type_hints(FLAG_TYPES[name])
    for field in dataclasses.fields(FLAG_TYPES[name]):
        if "range" in field.metadata:
            yield field, {hints[field.name], *typing.get_args(hints[field.name])}


@pytest.mark.parametrize("name", FLAG_TYPES)
def test_each_number_has_a_range_and_each_name_a_check(name):
    for field, types in flags_of(name):
        least, most, also = field.metadata["range"]
        if {int, float} & types:
            assert least is not None and most is not None, f"--{field.name} takes any number"
            assert also is None or (also == -1 and "-1" in field.metadata["help"]), field.name
            cli.flags.check_range(field, field.default)
        assert field.default != "", f"--{field.name} has an empty default"
        if field.name in ("model_tag", "run", "mixture", "task", "task_name"):
            assert field.metadata["check"], f"--{field.name} takes any text"


@pytest.mark.parametrize("name", FLAG_TYPES)
def test_no_text_flag_takes_a_blank(name):
    for field, types in flags_of(name):
        if str in types:
            flag = field.name.replace("_", "-").removesuffix("-dir")
            for blank in ("", " "):
                with pytest.raises(UsageError, match=f"-{flag}.*''|got ' '"):
                    parse(FLAG_TYPES[name], f"--{field.name}", blank)


# Values that no run can mean, by command and flag.
MEANINGLESS = {
    BaseTrainConfig: """num_iterations 0 -7 nan inf 1e30 1.5 | target_flops 0 -2 nan inf
        | target_param_data_ratio 0 -8 nan inf | total_batch_size 0 -2 | matrix_lr -1 nan inf 1e9
        | lr_scale 0 -0.5 nan | weight_decay -1 nan | warmup_steps -5 | warmdown_ratio 65 -1 nan
        | final_lr_frac 2 -0.1 nan | grad_clip -1 nan | seed -1 99999999999999999999
        | depth 0 -1 1000000000 | eval_every 0 -2 | save_every -2 | resume_from_step -2
        | num_processes 0""",
    BaseEvalConfig: "max_per_task 0 -5 | step -1",
    MidTrainConfig: "init_lr_frac 0 -1 nan inf",
    ChatSFTConfig: "eval_steps 0 -1 | mmlu_epochs -1 | chatcore_max_cat 0 -2",
    ChatRLConfig: "temperature -1 nan inf | weight_decay -1 nan",
    ChatConfig: "max_tokens 0 -1",
    ChatEvalConfig: "top_k -1",
    BenchConfig: "batch_sizes 0 1,-1 1,x 1e9 99999999999",
    ServeConfig: "port -1 65536 | timeout 0 -1 nan inf | grace -1 nan inf",
    PlanConfig: "depth 0 -4",
    dataset.DownloadConfig: "num_shards 0 -2 | num_workers 0 100000",
}


@pytest.mark.parametrize("config_type", MEANINGLESS)
def test_numbers_that_no_run_can_mean_are_refused(config_type):
    for flag in MEANINGLESS[config_type].split("|"):
        name, *values = flag.split()
        for value in values:
            with pytest.raises(UsageError) as refused:
                parse(config_type, f"--{name}", value)
            message = cli.with_flags(str(refused.value), config_type)
            assert f"--{name.replace('_', '-')}" in message and "got" in message


@pytest.mark.parametrize(
    "config_type, flags",
    [
        (
            BaseTrainConfig,
            "num_iterations=-1 lr_scale=-1 target_flops=-1 save_every=0 matrix_lr=0 "
            "seed=4294967295",
        ),
        (BaseEvalConfig, "max_per_task=-1"),
        (dataset.DownloadConfig, "num_shards=-1"),
    ],
)
def test_values_at_the_edges_keep_their_meaning(config_type, flags):
    config = parse(config_type, *(f"--{flag}" for flag in flags.split()))
    for name, value in (flag.split("=") for flag in flags.split()):
        assert getattr(config, name) == int(value)


TAGS = [*". .. ../x a/b /tmp/x .hidden -x a\\b *".split(), "a\nb", "x" * 101, "\udcff"]


@pytest.mark.parametrize("name", [n for n, cls in FLAG_TYPES.items() if hasattr(cls, "model_tag")])
def test_a_model_tag_is_a_name(name):
    for tag in TAGS:
        with pytest.raises(UsageError, match="--model-tag.*is not a name"):
            parse(FLAG_TYPES[name], f"--model-tag={tag}")


@pytest.mark.parametrize(
    "config_type, argv, named",
    [
        (MidTrainConfig, ["--mixture", "SmallTalk"], "SmallTalk"),
        (ChatSFTConfig, ["--mixture", "MMLU*0"], "MMLU"),
        (ChatSFTConfig, ["--mixture", "MMLU*nan"], "MMLU"),
        (ChatSFTConfig, ["--mixture", "SmolTalk,"], "unknown task ''"),
        (BaseTrainConfig, ["--run", "a\nb"], "--run"),
        (SpeedrunConfig, ["--run", "x" * 129], "--run"),
        (ChatEvalConfig, ["-a", "ARC-Easy|"], "unknown task ''"),
        (ChatRLConfig, ["--task", "GSM9K"], "GSM9K"),
        (ChatRLConfig, ["--source", "rl"], "--source"),
    ],
)
def test_names_are_checked_when_flags_are_read(config_type, argv, named):
    with pytest.raises(UsageError, match=named):
        parse(config_type, *argv)


@pytest.mark.parametrize(
    "name", [name for name, cls in FLAG_TYPES.items() if issubclass(cls, DeviceFlags)]
)
def test_every_script_on_devices_has_device_type(name):
    assert FLAG_TYPES[name].device_type is None
    with pytest.raises(UsageError, match="--device-type.*'mps', an Apple GPU, is not supported"):
        parse(FLAG_TYPES[name], "--device-type", "mps")


def test_scripts_that_load_a_model_run_on_devices():
    assert all(
        issubclass(cls, DeviceFlags) for cls in FLAG_TYPES.values() if hasattr(cls, "model_tag")
    )


@pytest.mark.parametrize("name", ["temperature", "top_k", "max_tokens"])
def test_the_server_takes_the_defaults_that_requests_could_name(name):
    field = next(field for field in dataclasses.fields(ServeConfig) if field.name == name)
    least, most, _ = field.metadata["range"]
    for value in (least, most):
        assert getattr(check(SamplingFields, {name: value}), name) == value
    for outside in (least - 1, most + 1):
        with pytest.raises(BadRequest):
            check(SamplingFields, {name: outside})

"""The commands, notes and estimates of a pipeline, by machine, corpus and flags."""

import dataclasses
import re

import pytest

from nanochat_jax.cli import parse
from nanochat_jax.errors import UsageError
from nanochat_jax.speedrun.machine import Machine
from nanochat_jax.speedrun.plan import SpeedrunConfig, plan_stages
from nanochat_jax.speedrun.recipes import STAGE_NAMES
from nanochat_jax.speedrun.stages import stage_keys
from nanochat_jax.train.pretrain import BaseTrainConfig
from nanochat_jax.train.rl import ChatRLConfig
from nanochat_jax.train.stages import ChatSFTConfig, MidTrainConfig
from scripts.base_loss import BaseLossConfig

CPU = Machine(platform="cpu", kind="cpu", count=1, peak_flops=None)
GPUS = Machine(platform="gpu", kind="NVIDIA H100", count=8, peak_flops=989e12)
TRAINING = ("base_train", "mid_train", "chat_sft")


def planned(machine=GPUS, on_disk=(), **flags):
    stages, _ = plan_stages(SpeedrunConfig(**flags), machine, "dummy", dict(on_disk))
    return {stage.name: stage for stage in stages}


def title(machine, on_disk, **flags):
    return plan_stages(SpeedrunConfig(**flags), machine, "dummy", on_disk)[1]


def test_a_gpu_node_trains_d20_on_real_data():
    stages = planned(mesh="8x1", with_rl=True)
    assert tuple(stages) == STAGE_NAMES
    base = stages["base_train"]
    assert "climbmix" in base.args
    assert "896.5M parameters" in base.note and "4,980 steps" in base.note


def test_the_record_is_upstreams_of_2026():
    """d24: 5,568 steps of 2^20 tokens, float8, then SFT from base with the base run's batch."""
    h100 = dataclasses.replace(GPUS, float8=True)
    stages = planned(h100, recipe="record")
    assert list(stages) == [
        *("data", "data_rest", "tok_train", "tok_eval", "base_train", "base_eval"),
        *("chat_sft", "chat_eval_sft", "report"),
    ]
    note = stages["base_train"].note
    assert "1384.1M parameters, 5,838.5M tokens in 5,568 steps" in note
    base = parse(BaseTrainConfig, stages["base_train"].command()[3:], prog="", description="")
    assert (base.step_precision, base.target_param_data_ratio) == ("fp8", 8)
    cadence = (base.eval_every, base.core_metric_every, base.sample_every)
    assert cadence == (250, 2000, 2000) and base.eval_tokens == 80 * 524288
    sft = parse(ChatSFTConfig, stages["chat_sft"].command()[3:], prog="", description="")
    assert sft.source == "base" and sft.load_optimizer
    assert sft.target_examples_per_step is None and sft.device_batch_size is None
    assert "--precision" not in planned(GPUS, recipe="record")["base_train"].args


def test_the_record_without_an_accelerator_is_small_and_has_no_midtraining():
    stages = planned(CPU, recipe="record", smoke=True)
    assert not {"mid_train", "chat_eval_mid", "base_loss", "data_rest"} & {*stages}
    assert "--num-iterations 4" in stages["chat_sft"].text()
    assert "--source base" in stages["chat_sft"].text()


def test_without_an_accelerator_the_pipeline_needs_no_network():
    stages = planned(CPU, {"climbmix": 8}, skip="base_eval,report")
    left_out = ("data_rest", "base_eval", "report", "chat_rl", "chat_eval_rl")
    assert list(stages) == [name for name in STAGE_NAMES if name not in left_out]
    assert stages["data"].args == ("embedded",)


def test_a_command_is_printed_as_one_would_type_it():
    stages = planned(CPU, smoke=True, with_rl=True, depth=6)
    text = stages["mid_train"].text()
    assert text.startswith("python -m scripts.mid_train --model-tag d6 --total-batch-size 4096 ")
    assert "--task 'WordArithmetic|Spelling'" in stages["chat_rl"].text()


def test_the_shards_that_the_depth_needs_are_fetched_and_explained():
    """5.22B tokens: 135 shards of 250M characters, 4.8 a token, a third cropped."""
    stages = planned(on_disk={"climbmix": 40}, mesh="8x1")
    first, rest = stages["data"], stages["data_rest"]
    assert first.args == ("--dataset", "climbmix", "-n", "10") and not first.background
    assert rest.args == ("--dataset", "climbmix", "-n", "136") and rest.background
    for text in ("first 10 of 136 training shards", "5.22B tokens", "40 are on disk"):
        assert text in first.note
    assert [name for name in stages if stages[name].waits_for == "data_rest"] == ["base_train"]
    assert list(planned(depth=4))[:2] == ["data", "tok_train"]


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
    assert title(GPUS, on_disk) == f"speedrun: d20 on {data}"
    assert ("data" in planned(on_disk=on_disk)) is (data != "custom")
    assert next(iter(planned(on_disk=on_disk, skip="data"))) == "tok_train"


def test_a_custom_corpus_must_exist():
    with pytest.raises(UsageError, match="make one with `python -m nanochat_jax.dataset hf`"):
        planned(data="custom")


def test_memory_savings_reach_every_training_stage_and_change_no_key():
    flags = dict(mesh="8x1", depth=32, with_rl=True)
    stages = planned(device_batch_size=2, remat="block", fsdp=True, **flags)
    configs = (BaseTrainConfig, MidTrainConfig, ChatSFTConfig, ChatRLConfig)
    parsed = {
        name: parse(config_type, stages[name].command()[3:], prog=name, description="")
        for name, config_type in zip((*TRAINING, "chat_rl"), configs, strict=True)
    }
    assert {(each.remat, each.fsdp) for each in parsed.values()} == {("block", True)}
    assert [parsed[name].device_batch_size for name in TRAINING] == [2, 2, 2]
    assert parsed["chat_rl"].device_batch_size == ChatRLConfig.device_batch_size
    assert stage_keys(stages.values(), "a") == stage_keys(planned(**flags).values(), "a")
    auto = planned(device_batch_size="auto", **flags)
    assert all(("--device-batch-size", "auto") == auto[name].placement[2:4] for name in TRAINING)
    # has no `auto`
    parse(BaseLossConfig, auto["base_loss"].command()[3:], prog="base_loss", description="")


def gibibytes(machine=GPUS, **flags):
    note = planned(machine, **flags)["base_train"].note
    return float(re.search(r"about ([\d.]+) GiB per device", note)[1])


def test_the_memory_of_the_plan():
    """At least the compiled plan's (tpu/plans), and not much more."""
    v5e = Machine(platform="tpu", kind="TPU v5e", count=16, peak_flops=197e12)
    saving = dict(remat="block", fsdp=True)
    assert 10.2 < gibibytes(v5e, device_batch_size=16, mesh="16x1", **saving) < 13
    settings = [
        dict(device_batch_size=8),
        dict(device_batch_size=4),
        dict(device_batch_size=4, fsdp=True),
        dict(device_batch_size=4, fsdp=True, remat="block"),
        dict(device_batch_size=4, fsdp=True, remat="full"),
    ]
    needed = [gibibytes(mesh="8x1", depth=32, **flags) for flags in settings]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == len(needed)

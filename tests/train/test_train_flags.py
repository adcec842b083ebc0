"""The training scripts accept every flag of upstream's two versions, in both spellings."""

import json

import pytest

from nanochat_jax import cli
from nanochat_jax.errors import UsageError
from nanochat_jax.train.pretrain import BaseTrainConfig
from nanochat_jax.train.rl import ChatRLConfig
from nanochat_jax.train.stages import ChatSFTConfig, MidTrainConfig
from scripts.base_loss import BaseLossConfig

# Upstream's settings, each with a value. Left out: --fp8 and --fp8-recipe, which this project does
# not have.
OPTIMIZER = "embedding_lr=0.2 unembedding_lr=0.004 matrix_lr=0.03 weight_decay=0.1"
CONTINUED = f"run=name device_type=cpu model_tag=tag step=3 dtype=bfloat16 {OPTIMIZER}"
FLAGS = {
    BaseTrainConfig: f"""
        run=name device_type=cpu depth=4 aspect_ratio=32 head_dim=64 max_seq_len=512
        window_pattern=SL num_iterations=20 target_flops=1e18 target_param_data_ratio=8.5
        device_batch_size=1 total_batch_size=512 {OPTIMIZER} scalar_lr=0.4 grad_clip=0.5
        warmup_ratio=0.1 warmup_steps=3 warmdown_ratio=0.3 final_lr_frac=0.1 resume_from_step=10
        eval_every=50 eval_tokens=512 core_metric_every=100 core_metric_max_per_task=10
        sample_every=100 save_every=10 model_tag=tag fp8=true""",
    MidTrainConfig: f"""
        {CONTINUED} num_iterations=5 max_seq_len=512 device_batch_size=2 init_lr_frac=0.5
        eval_every=10 eval_tokens=512 total_batch_size=1024 dry_run=true""",
    ChatSFTConfig: f"""
        {CONTINUED} source=base device_batch_size=2 num_epochs=2 num_iterations=5
        target_examples_per_step=16 init_lr_frac=0.5 eval_every=10 eval_steps=7 load_optimizer=true
        max_seq_len=512 total_batch_size=1024 warmup_ratio=0.1 warmdown_ratio=0.4 final_lr_frac=0.1
        eval_tokens=512 chatcore_every=100 chatcore_max_cat=5 chatcore_max_sample=6 mmlu_epochs=2
        gsm8k_epochs=3""",
    ChatRLConfig: f"""
        {CONTINUED} source=mid device_batch_size=2 examples_per_step=4 num_samples=32
        max_new_tokens=16 temperature=0.9 top_k=7 init_lr_frac=0.5 num_epochs=2 save_every=7
        eval_every=8 eval_examples=9""",
    BaseLossConfig: "device_batch_size=2 split_tokens=512 model_tag=tag step=3 device_type=cpu",
}
# Upstream's other names for some of them.
ALIASES = {
    BaseLossConfig: {"model_step": "step"},
    ChatRLConfig: {"model_step": "step"},
    MidTrainConfig: {"model_step": "step"},
    ChatSFTConfig: {
        "model_step": "step",
        "eval_metrics_every": "chatcore_every",
        "eval_metrics_max_problems": "chatcore_max_cat",
    },
}


def parse(config_type, *argv):
    return cli.parse(config_type, argv, prog="test", description="")


@pytest.mark.parametrize("config_type", FLAGS, ids=lambda config_type: config_type.__name__)
def test_every_flag_of_upstream_is_taken_in_both_spellings(config_type):
    texts = dict(flag.split("=") for flag in FLAGS[config_type].split())
    names = [*((name, name) for name in texts), *ALIASES.get(config_type, {}).items()]
    for name, field in names:
        dashes = parse(config_type, f"--{name.replace('_', '-')}", texts[field])
        underscores = parse(config_type, f"--{name}={texts[field]}")
        value = getattr(dashes, field)
        assert value == getattr(underscores, field) != getattr(parse(config_type), field)
        assert value == (texts[field] if isinstance(value, str) else json.loads(texts[field]))


def test_the_automatic_batch_is_a_word_among_numbers():
    assert parse(ChatSFTConfig, "--device-batch-size", "auto").device_batch_size == "auto"
    for value in ("large", "0"):
        with pytest.raises(UsageError, match=value):
            parse(BaseTrainConfig, "--device-batch-size", value)


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--resume", "--fresh"], "`fresh`"),
        (["--profile", "7"], "'7'"),
        (["--remat", "some"], "some"),
        (["--warmup-steps", "3", "--warmup-ratio", "0.1"], "`warmup_ratio`"),
        (["--device-type", "mps"], "mps"),
        (["--depth", "0"], "--depth must be at least 1"),
        (["--window-pattern", "XX"], "'XX'"),
        (["--head-dim", "7"], "7 must be even"),
        (["--head-dim", "2048"], "too large"),
        (["--data-shards", "0"], "--data-shards"),
        (["--eval-tokens", "0"], "--eval-tokens"),
    ],
)
def test_mistakes_are_refused(argv, named):
    with pytest.raises(UsageError, match=named):
        parse(BaseTrainConfig, *argv)


@pytest.mark.parametrize("resume", [["--resume"], ["--resume-from-step", "3"]])
def test_a_dry_run_goes_on_with_no_checkpoint(resume):
    with pytest.raises(UsageError, match="`dry_run`"):
        parse(MidTrainConfig, "--dry-run", *resume)


def test_sft_has_the_defaults_of_the_stage_that_it_continues():
    """Upstream's of December 2025 after midtraining, of 2026 straight from base."""
    mid, base = parse(ChatSFTConfig), parse(ChatSFTConfig, "--source", "base")
    expected = {
        "init_lr_frac": (0.02, 0.8),
        "warmup_ratio": (0.0, 0.0),
        "warmdown_ratio": (1.0, 0.5),
        "final_lr_frac": (0.0, 0.0),
        "eval_every": (100, 200),
        "eval_tokens": (20 * 524288, 40 * 524288),
        "chatcore_every": (-1, 200),
        "chatcore_max_sample": (24, 24),
        "load_optimizer": (False, True),
        "device_batch_size": (4, None),
        "target_examples_per_step": (32, None),
    }
    for name, (after_mid, after_base) in expected.items():
        assert (getattr(mid, name), getattr(base, name)) == (after_mid, after_base), name
    given = ("--load-optimizer", "0", "--chatcore-every", "-1", "--init-lr-frac", "0.02")
    base = parse(ChatSFTConfig, "--source", "base", *given)
    assert (base.load_optimizer, base.chatcore_every, base.init_lr_frac) == (False, -1, 0.02)

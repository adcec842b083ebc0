"""The training scripts take every flag of upstream's scripts of both eras, in both spellings."""

import pytest

from nanochat_jax import cli
from nanochat_jax.errors import UsageError
from nanochat_jax.train.rl import ChatRLConfig
from scripts.base_loss import BaseLossConfig
from scripts.base_train import BaseTrainConfig
from scripts.chat_sft import ChatSFTConfig
from scripts.mid_train import MidTrainConfig

# Upstream's settings, with a value that each takes. Left out: --fp8 and --fp8-recipe, which this
# project does not have.
FLAGS = {
    BaseTrainConfig: dict(
        run="name",
        device_type="cpu",
        depth=4,
        aspect_ratio=32,
        head_dim=64,
        max_seq_len=512,
        window_pattern="SL",
        num_iterations=20,
        target_flops=1e18,
        target_param_data_ratio=8.5,
        device_batch_size=1,
        total_batch_size=512,
        embedding_lr=0.2,
        unembedding_lr=0.004,
        weight_decay=0.1,
        matrix_lr=0.03,
        scalar_lr=0.4,
        grad_clip=0.5,
        warmup_ratio=0.1,
        warmup_steps=3,
        warmdown_ratio=0.3,
        final_lr_frac=0.1,
        resume_from_step=10,
        eval_every=50,
        eval_tokens=512,
        core_metric_every=100,
        core_metric_max_per_task=10,
        sample_every=100,
        save_every=10,
        model_tag="tag",
    ),
    MidTrainConfig: dict(
        run="name",
        device_type="cpu",
        model_tag="tag",
        step=3,
        dtype="bfloat16",
        num_iterations=5,
        max_seq_len=512,
        device_batch_size=2,
        unembedding_lr=0.004,
        embedding_lr=0.2,
        matrix_lr=0.03,
        init_lr_frac=0.5,
        weight_decay=0.1,
        eval_every=10,
        eval_tokens=512,
        total_batch_size=1024,
        dry_run=True,
    ),
    ChatSFTConfig: dict(
        run="name",
        source="base",
        device_type="cpu",
        model_tag="tag",
        step=3,
        dtype="bfloat16",
        device_batch_size=2,
        num_epochs=2,
        num_iterations=5,
        target_examples_per_step=16,
        unembedding_lr=0.004,
        embedding_lr=0.2,
        matrix_lr=0.03,
        weight_decay=0.1,
        init_lr_frac=0.5,
        eval_every=10,
        eval_steps=7,
        load_optimizer=True,
        max_seq_len=512,
        total_batch_size=1024,
        warmup_ratio=0.1,
        warmdown_ratio=0.4,
        final_lr_frac=0.1,
        eval_tokens=512,
        chatcore_every=100,
        chatcore_max_cat=5,
        chatcore_max_sample=6,
        mmlu_epochs=2,
        gsm8k_epochs=3,
    ),
    ChatRLConfig: dict(
        run="name",
        source="mid",
        device_type="cpu",
        model_tag="tag",
        step=3,
        dtype="bfloat16",
        device_batch_size=2,
        examples_per_step=4,
        num_samples=32,
        max_new_tokens=16,
        temperature=0.9,
        top_k=7,
        unembedding_lr=0.004,
        embedding_lr=0.2,
        matrix_lr=0.03,
        weight_decay=0.1,
        init_lr_frac=0.5,
        num_epochs=2,
        save_every=7,
        eval_every=8,
        eval_examples=9,
    ),
    BaseLossConfig: dict(
        device_batch_size=2, split_tokens=512, model_tag="tag", step=3, device_type="cpu"
    ),
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


def as_text(value):
    return str(int(value)) if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("config_type", FLAGS, ids=lambda config_type: config_type.__name__)
def test_every_flag_of_upstream_is_taken_in_both_spellings(config_type):
    flags = FLAGS[config_type]
    for name, field in [*((name, name) for name in flags), *ALIASES.get(config_type, {}).items()]:
        value = flags[field]
        dashes = parse(config_type, f"--{name.replace('_', '-')}", as_text(value))
        underscores = parse(config_type, f"--{name}={as_text(value)}")
        assert getattr(dashes, field) == getattr(underscores, field) == value
        assert getattr(parse(config_type), field) != value, (
            f"{name}: the value tried is the default"
        )


def test_the_automatic_batch_is_a_word_among_numbers():
    assert parse(ChatSFTConfig, "--device-batch-size", "auto").device_batch_size == "auto"
    for value in ("large", "0"):
        with pytest.raises(UsageError, match=value):
            parse(BaseTrainConfig, "--device-batch-size", value)


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--resume", "--fresh"], "--fresh"),
        (["--profile", "7"], "'7'"),
        (["--remat", "some"], "some"),
        (["--warmup-steps", "3", "--warmup-ratio", "0.1"], "--warmup-ratio"),
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


@pytest.mark.parametrize(
    "config_type, name",
    [
        (BaseLossConfig, "device-batch-size"),
        (BaseLossConfig, "split-tokens"),
        (ChatSFTConfig, "num-epochs"),
        (ChatSFTConfig, "target-examples-per-step"),
        (ChatSFTConfig, "keep"),
        (MidTrainConfig, "max-seq-len"),
    ],
)
def test_numbers_of_nothing_are_refused(config_type, name):
    with pytest.raises(UsageError, match=f"--{name} must be at least 1, got 0"):
        parse(config_type, f"--{name}", "0")


@pytest.mark.parametrize("resume", [["--resume"], ["--resume-from-step", "3"]])
def test_a_dry_run_goes_on_with_no_checkpoint(resume):
    with pytest.raises(UsageError, match="--dry-run"):
        parse(MidTrainConfig, "--dry-run", *resume)

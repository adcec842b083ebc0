"""What `--depth` derives equals upstream's published tables; flags override it."""

import pytest

from nanochat_jax import cli
from nanochat_jax.errors import UsageError
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.recipe import derive_recipe
from nanochat_jax.model.size import (
    flops_per_token,
    num_matrix_params,
    num_params,
    num_scaling_params,
    param_counts,
)
from nanochat_jax.train.pretrain import BaseTrainConfig, model_config, recipe

# depth, width, heads, parameters, scaling parameters, log2 of the batch, steps, weight decay,
# training FLOPs
MODERN = [
    (4, 256, 2, 36_700_242, 11_534_384, 18, 528, 1.8899, "1.11e16"),
    (8, 512, 4, 125_829_354, 41_943_232, 18, 1920, 0.5197, "1.49e17"),
    (12, 768, 6, 286_261_730, 110_100_912, 19, 2520, 0.2800, "1.00e18"),
    (16, 1024, 8, 536_871_738, 234_881_792, 19, 5376, 0.1313, "4.47e18"),
    (20, 1280, 10, 896_533_746, 435_160_240, 20, 4980, 0.1002, "1.51e19"),
    (24, 1536, 12, 1_384_122_122, 729_810_624, 20, 8352, 0.0597, "4.18e19"),
    (26, 1664, 13, 1_681_786_938, 918_423_532, 20, 10510, 0.0475, "6.60e19"),
    (32, 2048, 16, 2_818_575_450, 1_677_724_672, 21, 9600, 0.0368, "2.17e20"),
]
# depth, width, heads, parameters, FLOPs per token, steps, training FLOPs
CLASSIC = [
    (4, 256, 2, 36_700_160, "1.4470e8", 1_400, "1.06e17"),
    (12, 768, 6, 185_597_952, "1.0381e9", 7_080, "3.85e18"),
    (20, 1280, 10, 560_988_160, "3.491758e9", 21_400, "3.917670e19"),
    (26, 1664, 13, 1_081_999_360, "6.9009e9", 41_275, "1.49e20"),
    (32, 2048, 16, 1_879_048_192, "1.207960e10", 71_680, "4.539628e20"),
    (34, 2176, 17, 2_217_082_880, "1.4265e10", 84_575, None),
]


def shown(value, like):
    """A number with as many digits as the published one."""
    digits = len(like.split("e")[0].split(".")[1])
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def dial(*argv, vocab_size=32768):
    config = cli.parse(BaseTrainConfig, list(argv), prog="base_train", description="")
    model, reference = model_config(config, vocab_size)
    return model, recipe(config, model, reference)


@pytest.mark.parametrize("row", MODERN, ids=lambda row: f"d{row[0]}")
def test_modern_table(row):
    depth, width, heads, params, scaling, log_batch, steps, decay, flops = row
    model, plan = dial("--depth", str(depth))
    assert (model.n_embd, model.n_head, model.n_kv_head) == (width, heads, heads)
    assert (num_params(model), num_scaling_params(model)) == (params, scaling)
    assert (plan.total_batch_size, plan.num_iterations) == (2**log_batch, steps)
    assert round(plan.weight_decay, 4) == decay
    assert plan.lr_scale == pytest.approx((2**log_batch / 2**19) ** 0.5)
    assert shown(flops_per_token(model) * plan.total_tokens, flops) == flops


@pytest.mark.parametrize("row", CLASSIC, ids=lambda row: f"d{row[0]}")
def test_classic_table(row):
    depth, width, heads, params, flops_each, steps, flops = row
    model, plan = dial("--depth", str(depth), "--arch", "classic", vocab_size=65536)
    assert (model.n_embd, model.n_head, num_params(model)) == (width, heads, params)
    assert (plan.total_batch_size, plan.num_iterations, plan.lr_scale, plan.weight_decay) == (
        524288,
        steps,
        1.0,
        0.0,
    )
    assert shown(flops_per_token(model), flops_each) == flops_each
    if flops:
        assert shown(flops_per_token(model) * plan.total_tokens, flops) == flops


def test_published_details_of_d12_and_of_the_speedrun():
    d12, _ = dial("--depth", "12")
    counts = param_counts(d12)
    scalars = sum(counts[group] for group in ("scalars", "resid_lambdas", "x0_lambdas"))
    assert (num_matrix_params(d12), scalars) == (84_935_088, 50)
    value_embeds = (
        len(d12.value_embed_layers) * d12.padded_vocab_size * d12.n_kv_head * d12.head_dim
    )
    assert (value_embeds, d12.padded_vocab_size * d12.n_embd) == (150_994_944, 25_165_824)
    d24, speedrun = dial("--depth", "24", "--target-param-data-ratio", "8")
    assert speedrun.num_iterations == 5_568
    assert float(f"{flops_per_token(d24) * speedrun.total_tokens:.2e}") == 2.79e19


def test_shape_flags_override_the_dial():
    model, _ = dial(
        "--depth",
        "6",
        "--aspect-ratio",
        "48",
        "--head_dim=64",
        "--max-seq-len",
        "512",
        "--window-pattern",
        "L",
        "--num-iterations",
        "5",
    )
    assert (model.n_embd, model.n_head, model.sequence_len, set(model.windows)) == (
        320,
        5,
        512,
        {512},
    )


def test_the_horizon_follows_iterations_then_flops_then_the_ratio():
    model, plan = dial("--depth", "12", "--num-iterations", "7", "--target-flops", "1e18")
    assert (plan.num_iterations, plan.total_batch_size, round(plan.weight_decay, 4)) == (
        7,
        2**19,
        0.28,
    )
    _, plan = dial("--depth", "12", "--target-flops", "1e18", "--target-param-data-ratio", "3")
    assert plan.num_iterations == round(1e18 / (flops_per_token(model) * plan.total_batch_size))
    _, plan = dial("--depth", "12", "--target-param-data-ratio", "6")
    assert plan.num_iterations * plan.total_batch_size == pytest.approx(
        6 * num_scaling_params(model), rel=1e-3
    )


def test_a_given_batch_scales_rates_and_decay():
    _, plan = dial("--depth", "12", "--total-batch-size", "512", "--num-iterations", "20")
    assert plan.lr_scale == pytest.approx(0.03125)
    assert plan.weight_decay == pytest.approx(0.28 * 0.03125)


def test_windows_are_a_quarter_rounded_up_and_the_last_layer_is_long():
    for length, short in ((2048, 512), (1024, 256), (512, 128), (64, 128), (1026, 384)):
        assert GPTConfig.modern(5, sequence_len=length).windows == (
            short,
            short,
            short,
            length,
            length,
        )
    assert GPTConfig.modern(2, window_pattern="S").windows == (512, 2048)


def test_a_run_without_a_step_is_refused_with_the_numbers():
    model = GPTConfig.modern(4)
    with pytest.raises(UsageError, match="0 steps of 99999999999 tokens"):
        derive_recipe(model, reference=GPTConfig.modern(12), total_batch_size=99999999999)

"""Parity with upstream: tensors that its PyTorch code made, both architectures, float32 on the CPU,
and ids of its tokenizer."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_data import golden_sets, golden_tokenizer, load_golden
from safetensors.numpy import load_file

from nanochat_jax.conversation import render_conversation, render_for_completion
from nanochat_jax.interop.torch_checkpoint import read_checkpoint
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.gpt import forward, init_cache, unembed
from nanochat_jax.model.loss import cross_entropy
from nanochat_jax.model.size import (
    flops_per_token,
    num_matrix_params,
    num_params,
    num_scaling_params,
    param_counts,
)
from nanochat_jax.train.optim import OptimizerConfig, Schedules, make_optimizer

SETS = golden_sets()
TRACES = [path for directory in SETS for path in sorted(directory.glob("optimizer_trace*.json"))]


@pytest.fixture(params=SETS, ids=lambda path: path.name, scope="module")
def golden(request):
    found = read_checkpoint(request.param)
    params = jax.tree.map(jnp.asarray, found.params)
    return request.param, found.config, params, load_file(request.param / "activations.safetensors")


def mean_loss(params, config, inputs, targets):
    hidden, _ = forward(params, inputs, config=config)
    weight = params["lm_head"][:, : config.vocab_size]
    scale = jnp.full(targets.shape, 1.0 / (targets >= 0).sum())
    return cross_entropy(hidden, weight, targets, scale, config.softcap, inputs.shape[1] // 4)


# One program for all tests of a configuration.
value_and_grad = jax.jit(jax.value_and_grad(mean_loss, has_aux=True), static_argnums=1)


@functools.partial(jax.jit, static_argnums=2)
def all_logits(params, tokens, config):
    return unembed(params, forward(params, tokens, config=config)[0], config=config)


def assert_trees_close(tree, reference, tolerance):
    def check(path, a, b):
        error = np.linalg.norm(np.asarray(a) - b) / max(np.linalg.norm(b), 1e-30)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.2e}"

    jax.tree.map_with_path(check, tree, reference)


def test_logits_and_losses_equal_upstream(golden):
    _, config, params, reference = golden
    logits = all_logits(params, reference["inputs"], config)
    assert np.abs(logits - reference["logits"]).max() < 1e-4
    (loss, nll), _ = value_and_grad(params, config, reference["inputs"], reference["targets"])
    np.testing.assert_allclose(loss, reference["loss_mean"], rtol=1e-5)
    np.testing.assert_allclose(nll.ravel(), reference["loss_none"].ravel(), atol=1e-4)


def test_logits_with_exact_rotary_tables_equal_upstream(golden):
    directory, _, params, reference = golden
    if "logits_fp32_rotary" not in reference:
        pytest.skip("this era keeps its rotary tables in float32")
    config = read_checkpoint(directory, rotary_dtype="float32").config
    logits = all_logits(params, reference["inputs"], config)
    assert np.abs(logits - reference["logits_fp32_rotary"]).max() < 1e-4


def test_gradients_equal_upstream(golden):
    directory, config, params, reference = golden
    _, grads = value_and_grad(params, config, reference["inputs"], reference["targets"])
    assert_trees_close(grads, load_golden(directory, "grads", config), 1e-4)


def test_greedy_decoding_equals_upstream(golden):
    _, config, params, reference = golden
    prompt, expected = ([int(t) for t in reference[name].ravel()] for name in ("prompt", "greedy"))
    expected = expected[-24:]
    cache = init_cache(config, 1, len(prompt) + len(expected))

    @jax.jit
    def step(tokens, cache):
        hidden, cache = forward(params, tokens, config=config, cache=cache)
        return unembed(params, hidden[:, -1], config=config).argmax(), cache

    token, cache = step(np.array([prompt], np.int32), cache)
    generated = [int(token)]
    while len(generated) < len(expected):
        token, cache = step(np.array([generated[-1:]], np.int32), cache)
        generated.append(int(token))
    assert generated == expected
    # By induction: each token is the greatest logit after all before it.
    whole = np.array([prompt + expected[:-1]], np.int32)
    logits = all_logits(params, whole, config)
    assert logits[0, len(prompt) - 1 :].argmax(axis=-1).tolist() == expected


@pytest.mark.parametrize(
    "path", TRACES, ids=lambda path: f"{path.parent.name}-{path.stem.removeprefix('optimizer_')}"
)
def test_optimizer_trace_equals_upstream(path):
    directory, trace = path.parent, json.loads(path.read_text())
    config = read_checkpoint(directory).config
    rounded = trace.get("ns_dtype") == "bf16"  # the iteration in bfloat16 differs by its rounding
    suffix = f"_ns_{trace['ns_dtype']}" if "ns_dtype" in trace else ""
    batch = load_file(directory / "activations.safetensors")
    rates = {name: value for name, value in trace["hparams"].items() if name != "weight_decay"}
    if config.arch == "classic":
        rates["weight_decay"] = trace["hparams"]["weight_decay"]
    table = lambda key: lambda step: jnp.array(trace[key], jnp.float32)[step]  # noqa: E731
    schedules = Schedules(
        lr_multiplier=table("lr_multiplier"),
        momentum=table("muon_momentum"),
        weight_decay=table("muon_weight_decay") if "muon_weight_decay" in trace else None,
    )
    optimizer = make_optimizer(
        config,
        OptimizerConfig(**rates),
        schedules,
        Compute(dtype=jnp.bfloat16 if rounded else jnp.float32),
    )
    params = jax.tree.map(jnp.asarray, read_checkpoint(directory).params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step, expected in enumerate(trace["loss_before_step"]):
        (loss, _), grads = value_and_grad(params, config, batch["inputs"], batch["targets"])
        np.testing.assert_allclose(loss, expected, rtol=1e-2 if rounded else 1e-4)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        name = f"params_after_step{step + 1}{suffix}"
        if (directory / f"{name}.safetensors").exists():
            assert_trees_close(
                params, load_golden(directory, name, config), 2e-2 if rounded else 1e-4
            )


SCALARS = ("scalars", "resid_lambdas", "x0_lambdas")  # optimizer groups


def test_model_shape_and_flops_equal_upstream():
    traces = [path for path in TRACES if "flops_per_token" in path.read_text()]
    if not traces:
        pytest.skip("no reference data with counts")
    for path in traces:
        trace, config = json.loads(path.read_text()), read_checkpoint(path.parent).config
        counts = trace["num_scaling_params"]
        assert list(config.windows) == trace["window_sizes"]
        assert flops_per_token(config) == trace["flops_per_token"]
        assert num_params(config) == counts["total"]
        assert sum(param_counts(config).get(group, 0) for group in SCALARS) == counts["scalars"]
        assert num_matrix_params(config) == counts["transformer_matrices"]
        assert num_scaling_params(config) == counts["transformer_matrices"] + counts["lm_head"]


def test_ids_equal_upstream():
    tokenizer, expected = golden_tokenizer()
    assert tokenizer.special_tokens == expected["special_tokens"]
    assert tokenizer.pattern == expected["pattern"]
    for sample in expected["samples"]:
        assert tokenizer.encode(sample["text"]) == sample["ids"], sample["text"]


def test_ids_and_masks_of_conversations_equal_upstream():
    tokenizer, expected = golden_tokenizer()
    for case in expected["conversations"]:
        conversation = case["conversation"]
        assert render_conversation(tokenizer, conversation) == (case["ids"], case["mask"])
        assert render_conversation(tokenizer, conversation, 12)[0] == case["ids_max_tokens_12"]
        assert render_for_completion(tokenizer, conversation) == case["completion_ids"]

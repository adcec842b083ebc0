"""Numerics against tensors that upstream's PyTorch made, both eras, float32 on the CPU."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from golden_weights import golden_config, load_golden
from nanochat_jax.gpt import forward, init_cache, unembed
from nanochat_jax.loss import cross_entropy
from nanochat_jax.optim import OptimizerConfig, make_optimizer

ERAS = ("classic", "modern")


@pytest.fixture(params=ERAS)
def golden(request, test_data):
    directory = test_data / "golden" / request.param
    config = golden_config(directory)
    return directory, config, load_golden(directory, "model", config), load_file(directory / "activations.safetensors")


def mean_loss(params, config, inputs, targets):
    hidden, _ = forward(params, inputs, config=config)
    weight = params["lm_head"][:, : config.vocab_size]
    scale = jnp.full(targets.shape, 1.0 / (targets >= 0).sum())
    return cross_entropy(hidden, weight, targets, scale, config.softcap, inputs.shape[1] // 4)


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - b) / max(np.linalg.norm(b), 1e-30))


def assert_trees_close(tree, reference, tolerance):
    jax.tree.map_with_path(lambda path, a, b: check(path, a, b, tolerance), tree, reference)


def check(path, a, b, tolerance):
    error = relative(a, b)
    assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.2e}"


def test_logits_and_losses_equal_upstream(golden):
    _, config, params, reference = golden
    hidden, _ = forward(params, reference["inputs"], config=config)
    assert np.abs(unembed(params, hidden, config=config) - reference["logits"]).max() < 1e-4
    loss, nll = mean_loss(params, config, reference["inputs"], reference["targets"])
    np.testing.assert_allclose(loss, reference["loss_mean"], rtol=1e-5)
    np.testing.assert_allclose(nll.ravel(), reference["loss_none"].ravel(), atol=1e-4)


def test_gradients_equal_upstream(golden):
    directory, config, params, reference = golden
    grads, _ = jax.grad(mean_loss, has_aux=True)(params, config, reference["inputs"], reference["targets"])
    assert_trees_close(grads, load_golden(directory, "grads", config), 1e-4)


def test_greedy_decoding_through_the_cache_equals_upstream(golden):
    _, config, params, reference = golden
    tokens = [int(t) for t in reference["prompt"].ravel()]
    cache = init_cache(config, 1, config.sequence_len)
    step = jax.jit(lambda tokens, cache: forward(params, tokens, config=config, cache=cache))
    hidden, cache = step(np.array([tokens], np.int32), cache)
    generated = []
    for _ in range(24):
        generated.append(int(unembed(params, hidden[:, -1], config=config).argmax()))
        hidden, cache = step(np.array([generated[-1:]], np.int32), cache)
    expected = [int(t) for t in reference["greedy"].ravel()][-24:]
    assert generated == expected


@pytest.mark.parametrize("era", ERAS)
def test_optimizer_trace_equals_upstream(era, test_data):
    directory = test_data / "golden" / era
    config = golden_config(directory)
    batch = load_file(directory / "activations.safetensors")
    suffix, trace_name = ("_ns_fp32", "optimizer_trace_fp32.json") if era == "classic" else ("", "optimizer_trace.json")
    trace = json.loads((directory / trace_name).read_text())
    rates = {name: trace["hparams"][name] for name in ("embedding_lr", "unembedding_lr", "matrix_lr")}
    table = lambda key: lambda step: jnp.array(trace[key], jnp.float32)[step]  # noqa: E731
    optimizer = make_optimizer(
        config, OptimizerConfig(**rates), lr_multiplier=table("lr_multiplier"), momentum=table("muon_momentum"),
        weight_decay=table("muon_weight_decay") if era == "modern" else None,
    )
    params = jax.tree.map(jnp.asarray, load_golden(directory, "model", config))
    state = optimizer.init(params)
    for step in range(4):
        (loss, _), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, config, batch["inputs"], batch["targets"])
        np.testing.assert_allclose(loss, trace["loss_before_step"][step], rtol=1e-4)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if step in (0, 3):
            reference = load_golden(directory, f"params_after_step{step + 1}{suffix}", config)
            assert_trees_close(params, reference, 1e-4)

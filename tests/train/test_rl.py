"""Policy gradients: the loss against a plain form, how rows are cut, and that reward goes up."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chain_model import ASSISTANT_START, CHAIN, END, OUTPUT_END, PYTHON, PYTHON_END, chain_params
from random_model import random_params

from nanochat_jax.eval.chat import Sampling
from nanochat_jax.infer import decode
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.request import Request
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.gpt import forward, unembed
from nanochat_jax.model.loss import Batch, token_nll
from nanochat_jax.model.sharding import make_mesh, param_shardings, spread_rows
from nanochat_jax.model.weights import abstract_params
from nanochat_jax.tasks.base import Task, assistant, user
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import policy
from nanochat_jax.train.finetune import continued_optimizer
from nanochat_jax.train.optim import OptimizerConfig, Schedules, constant
from nanochat_jax.train.policy import Rollout
from nanochat_jax.train.rl import ChatRLConfig, sampling_memory
from nanochat_jax.train.step import init_state, make_train_step

TOKENIZER = Tokenizer({bytes([i]): i for i in range(256)})
CONFIG = GPTConfig.classic(
    1, n_embd=32, n_head=1, n_kv_head=1, sequence_len=64, vocab_size=TOKENIZER.vocab_size
)


policy_gradient = jax.jit(
    jax.value_and_grad(functools.partial(token_nll, config=CONFIG, compute=Compute()), has_aux=True)
)


def random_groups(num_prompts: int = 2, num_samples: int = 4) -> list[list[Rollout]]:
    rng = np.random.default_rng(1)
    groups = []
    for _ in range(num_prompts):
        prompt = rng.integers(0, 256, 5).tolist()
        group = []
        for _ in range(num_samples):
            reply = rng.integers(0, 256, int(rng.integers(1, 20))).tolist()
            sampled = (rng.random(len(reply)) < 0.8).tolist()
            group.append(Rollout(prompt + reply, [False] * 5 + sampled, float(rng.integers(0, 2))))
        groups.append(group)
    return groups


def plain_loss(params, groups: list[list[Rollout]], pass_rows: int):
    """Upstream's loss, pass by pass and token by token."""
    rollouts = [rollout for group in groups for rollout in group]
    longest = max(len(rollout.tokens) for rollout in rollouts)
    tokens = np.array(
        [rollout.tokens + [0] * (longest - len(rollout.tokens)) for rollout in rollouts]
    )
    log_probs = jax.nn.log_softmax(
        unembed(params, forward(params, tokens, config=CONFIG)[0], config=CONFIG)
    )
    num_passes = len(rollouts) // pass_rows
    factor = np.zeros(log_probs.shape)
    for start in range(0, len(rollouts), pass_rows):
        rows = range(start, start + pass_rows)
        count = sum(sum(rollouts[row].sampled) for row in rows)
        for row in rows:
            group = next(group for group in groups if rollouts[row] in group)
            mean = sum(rollout.reward for rollout in group) / len(group)
            for position, (token, sampled) in enumerate(
                zip(rollouts[row].tokens, rollouts[row].sampled, strict=True)
            ):
                if sampled:
                    factor[row, position - 1, token] = (
                        (rollouts[row].reward - mean) / max(1, count) / num_passes
                    )
    return -(log_probs * factor).sum()


def test_advantages_sum_to_zero_and_vanish_where_all_agree():
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(
        policy.advantages(rewards), [[0.75, -0.25, -0.25, -0.25], [0] * 4, [0] * 4]
    )


def test_only_sampled_tokens_are_targets():
    group = [
        Rollout([7, 8, 9, 10, 11], [False, False, True, False, True], 1.0),
        Rollout([7, 8, 5], [False, False, True], 0.0),
    ]
    batch = policy.policy_batch([group], pass_rows=2, micro_rows=4)
    inputs, targets, weights = (x[0] for x in batch)
    assert batch.inputs.shape == (1, 4, 32)
    assert inputs[0, :5].tolist() == [7, 8, 9, 10, 0]
    assert targets[0, :5].tolist() == [-1, 9, -1, 11, -1]
    assert targets[1, :3].tolist() == [-1, 5, -1]
    assert (targets[2:] == -1).all() and (weights[2:] == 0).all()
    np.testing.assert_allclose(weights[:2, 0], [0.5 / 3, -0.5 / 3])
    with pytest.raises(ValueError, match="not a multiple"):
        policy.policy_batch([group], pass_rows=3, micro_rows=4)


@pytest.mark.parametrize("pass_rows", [2, 4])
def test_loss_and_gradient_equal_the_plain_form(pass_rows):
    params, groups = random_params(CONFIG), random_groups()
    batch = policy.policy_batch(groups, pass_rows=pass_rows, micro_rows=3)
    batches = [policy_gradient(params, Batch(*rows)) for rows in zip(*batch)]
    loss, grads = jax.tree.map(
        lambda *parts: sum(parts), *[(loss, grads) for (loss, _), grads in batches]
    )
    expected, expected_grads = jax.jit(
        jax.value_and_grad(lambda params: plain_loss(params, groups, pass_rows))
    )(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, expected_grads
    )


def test_groups_that_agree_give_no_gradient():
    """What they take from the mean over all passes stays."""
    alike = [
        [Rollout(rollout.tokens, rollout.sampled, 1.0) for rollout in group]
        for group in random_groups()
    ]
    empty = policy.policy_batch(alike, pass_rows=4, micro_rows=4)
    assert len(empty.inputs) == 1 and (empty.targets == -1).all()
    groups = random_groups()
    alone, among = (
        policy.policy_batch(each, pass_rows=4, micro_rows=8) for each in (groups, groups + alike)
    )
    np.testing.assert_array_equal(alone.inputs, among.inputs)
    np.testing.assert_allclose(alone.weights, 2 * among.weights, rtol=1e-6)


def test_micro_batches_and_a_mesh_do_not_change_the_step():
    groups = random_groups(num_prompts=3)
    results = []
    for name, micro_rows, fsdp in (
        ("1x1", 12, False),
        ("1x1", 4, False),
        ("4x1", 4, False),
        ("4x1", 4, True),
    ):
        mesh = make_mesh(name)
        optimizer = optax.sgd(1.0)
        params = jax.tree.map(jnp.asarray, random_params(CONFIG))
        params = jax.device_put(params, param_shardings(CONFIG, mesh, fsdp=fsdp))
        state, shardings = init_state(CONFIG, optimizer, mesh, fsdp=fsdp, seed=0, params=params)
        step = make_train_step(CONFIG, optimizer, Compute(mesh=mesh), shardings)
        batch = policy.policy_batch(groups, pass_rows=4, micro_rows=micro_rows)
        state, metrics = step(state, Batch(*(spread_rows(mesh, array, axis=1) for array in batch)))
        results.append((jax.device_get(state.params), float(metrics["loss"])))
    for params, loss in results[1:]:
        np.testing.assert_allclose(loss, results[0][1], rtol=1e-4)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
            params,
            results[0][0],
        )


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_log_probabilities_recomputed_are_the_samplers(arch):
    config = CONFIG
    if arch == "modern":
        config = GPTConfig.modern(
            2, aspect_ratio=16, head_dim=32, sequence_len=64, vocab_size=TOKENIZER.vocab_size
        )
    params = random_params(config)
    engine = Engine(config, params, TOKENIZER, num_slots=4)
    requests = [
        Request(
            (TOKENIZER.bos_id, *range(40, 40 + n)), max_tokens=20, top_k=0, seed=n, logprobs=True
        )
        for n in (1, 3, 7, 12)
    ]
    results = engine.generate(requests)
    group = [
        Rollout(
            [*request.tokens, *result.tokens],
            [False] * len(request.tokens) + list(result.sampled),
            float(i % 2),
        )
        for i, (request, result) in enumerate(zip(requests, results, strict=True))
    ]
    batch = Batch(*(x[0] for x in policy.policy_batch([group], pass_rows=4, micro_rows=4)))
    _, nll = jax.jit(functools.partial(token_nll, config=config, compute=Compute()))(params, batch)
    compared = 0
    for row, result in enumerate(results):
        recomputed = -np.asarray(nll)[row][batch.targets[row] >= 0]
        expected = np.array(result.logprobs)[np.array(result.sampled, bool)]
        np.testing.assert_allclose(recomputed, expected, atol=1e-4)
        compared += len(recomputed)
    assert compared > 40


def test_statistics_tell_spread_and_signal_apart():
    groups = [
        [
            Rollout([1] * (3 + s), [False] * 2 + [True] * (1 + s), reward, -1.0)
            for s, reward in enumerate(rewards)
        ]
        for rewards in ((1.0, 0.0), (1.0, 1.0))
    ]
    found = policy.statistics(groups)
    assert found["reward"] == 0.75 and found["reward_std"] == pytest.approx(np.std([1, 0, 1, 1]))
    assert found["reward_group_std"] == 0.25 and found["mixed"] == 0.5
    assert (found["advantage_min"], found["advantage_max"]) == (-0.5, 0.5)
    assert found["entropy"] == pytest.approx(4.0 / 6)
    assert (found["sequence_length"], found["sequence_length_max"], found["sampled_tokens"]) == (
        3.5,
        4,
        1.5,
    )


def test_rewards_that_do_not_differ_are_a_warning(caplog):
    watch = policy.RewardWatch()

    def warnings(*mixed):
        caplog.clear()
        for share in mixed:
            watch.step({"mixed": share, "reward": 0.0})
        return [record.message for record in caplog.records]

    assert warnings(0, 0, 0.5, 0, 0) == []
    (message,) = warnings(0)
    assert "the same reward in the last 3 steps" in message
    assert warnings(0, 0) == [] and "last 6 steps" in warnings(0)[0]
    assert warnings(1, 0, 0) == [] and "last 3 steps" in warnings(0)[0]


class Said(Task):
    """The whole reply should be `ok`."""

    eval_type = "generative"

    def evaluate(self, conversation, completion: str) -> bool:
        return completion == "ok"


def test_a_reward_is_for_the_text_without_the_calculators_calls(caplog):
    params = chain_params((ASSISTANT_START, PYTHON, "6*7", PYTHON_END), (OUTPUT_END, "ok", END))
    engine = Engine(CHAIN, params, TOKENIZER, num_slots=2)
    sampling = Sampling(num_samples=1, max_new_tokens=20, temperature=0.0)
    asked = [
        {"messages": [user("?" * length), assistant("ok")]} for length in (1, CHAIN.sequence_len)
    ]
    groups = policy.sample_rollouts(engine, TOKENIZER, Said(), asked, sampling)
    assert [group[0].reward for group in groups] == [1.0, 1.0]
    assert (
        f"1 of 2 prompts are longer than the context of {CHAIN.sequence_len} tokens" in caplog.text
    )


def test_pass_at_k_counts_problems_solved_by_the_first_k_samples():
    rewards = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]], float)
    np.testing.assert_allclose(policy.pass_at_k(rewards), [0.25, 0.5, 0.75])


class Vowels(Task):
    """The reply's first letter should be a vowel."""

    eval_type = "generative"

    def num_examples(self) -> int:
        return 8

    def get_example(self, index: int):
        return {"messages": [user(f"#{index}"), assistant("a")]}

    def evaluate(self, conversation, completion: str) -> bool:
        return completion[:1] in tuple("aeiou")


def test_rollouts_keep_the_prompt_apart_and_differ_among_samples():
    sampling = Sampling(num_samples=4, max_new_tokens=6, temperature=1.0, top_k=0)
    engine = Engine(CONFIG, random_params(CONFIG), TOKENIZER, num_slots=8)
    task = Vowels()

    def sample(seed):
        drawn = dataclasses.replace(sampling, seed=seed)
        return policy.sample_rollouts(engine, TOKENIZER, task, [task[0], task[1]], drawn)

    groups = sample(seed=1)
    for index, group in enumerate(groups):
        asked = TOKENIZER.encode(f"#{index}", prepend="<|user_start|>", append="<|user_end|>")
        prompt = [TOKENIZER.bos_id, *asked, TOKENIZER.encode_special("<|assistant_start|>")]
        assert len({tuple(rollout.tokens) for rollout in group}) > 1
        for rollout in group:
            assert rollout.tokens[: len(prompt)] == prompt and len(rollout.sampled) == len(
                rollout.tokens
            )
            assert not any(rollout.sampled[: len(prompt)]) and all(rollout.sampled[len(prompt) :])
            text = TOKENIZER.decode(
                [token for token in rollout.tokens[len(prompt) :] if token < 256]
            )
            assert rollout.reward == Vowels().evaluate(task[index], text)
    assert sample(seed=1) == groups and sample(seed=2) != groups
    other = engine.with_params(random_params(CONFIG, 0.5))
    engine, before = Engine(CONFIG, random_params(CONFIG, 0.5), TOKENIZER, num_slots=8), engine
    fresh = sample(seed=1)
    engine = other
    assert sample(seed=1) == fresh != groups
    engine = before
    assert sample(seed=1) == groups


def test_init_lr_frac_scales_the_rates_of_all_groups():
    config = GPTConfig.modern(
        2, aspect_ratio=16, head_dim=32, sequence_len=64, vocab_size=TOKENIZER.vocab_size
    )
    loaded = types.SimpleNamespace(
        config=config, meta={"rates": dataclasses.asdict(OptimizerConfig())}
    )
    params = jax.tree.map(lambda w: jnp.ones(w.shape), abstract_params(config))

    def change(fraction):
        schedules = Schedules(lr_multiplier=constant(1.0), momentum=constant(0.95))
        compute = Compute(mesh=make_mesh("1x1"))
        config = ChatRLConfig(init_lr_frac=fraction)
        optimizer = continued_optimizer(config, loaded, schedules, compute)
        return jax.jit(lambda params: optimizer.update(params, optimizer.init(params), params)[0])(
            params
        )

    jax.tree.map(
        lambda whole, half: np.testing.assert_allclose(half, whole / 2, rtol=1e-4),
        change(0.5),
        change(0.25),
    )


def test_reward_rises():
    mesh, task = make_mesh("1x1"), Vowels()
    optimizer = optax.adam(0.02)
    params = jax.tree.map(jnp.asarray, random_params(CONFIG, 0.02))
    state, shardings = init_state(CONFIG, optimizer, mesh, fsdp=False, seed=0, params=params)
    step = make_train_step(CONFIG, optimizer, Compute(mesh=mesh), shardings)
    sampling = Sampling(num_samples=64, max_new_tokens=1, temperature=1.0, top_k=0)
    means = []
    for i in range(12):
        engine = Engine(CONFIG, state.params, TOKENIZER, num_slots=64, steps_per_dispatch=1)
        groups = policy.sample_rollouts(
            engine, TOKENIZER, task, [task[0], task[1]], dataclasses.replace(sampling, seed=i)
        )
        means.append(np.mean([rollout.reward for group in groups for rollout in group]))
        state, _ = step(state, policy.policy_batch(groups, pass_rows=64, micro_rows=128))
    assert means[0] < 0.15 and np.mean(means[-2:]) > 0.5, means


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_sampling_holds_in_memory_is_counted(dtype):
    engine = Engine(
        CONFIG, random_params(CONFIG), TOKENIZER, num_slots=4, compute=Compute(dtype=dtype)
    )
    slots = decode.new_slots(rows=4, length=CONFIG.sequence_len, static=engine.static)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((engine.params, slots)))
    counted = sampling_memory(ChatRLConfig(num_slots=4, dtype=dtype), CONFIG, make_mesh("1x1"))
    assert held == pytest.approx(counted, rel=0.1)  # but for the rows that fill up the vocabulary

"""Prefix reuse: which slot a request gets, where it starts, and that the tokens are the same."""

import random

import jax
import numpy as np
import pytest

from nanochat_jax.infer import engine as engine_module
from nanochat_jax.infer.engine import Engine, EngineLoop
from nanochat_jax.infer.request import NoTokenizer, Request
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import init_params

VOCAB, CONTEXT = 300, 160
CONFIGS = {
    "classic": GPTConfig.classic(2, vocab_size=VOCAB, sequence_len=CONTEXT),
    "modern": GPTConfig.modern(  # short windows, value embeddings, smear
        4,
        head_dim=16,
        aspect_ratio=16,
        window_pattern="SSSL",
        vocab_size=VOCAB,
        sequence_len=CONTEXT,
    ),
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def engine(request):
    config = CONFIGS[request.param]
    params = init_params(config, jax.random.key(0))
    noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape, x.dtype)  # noqa: E731
    return Engine(config, jax.tree.map(noise, params), NoTokenizer(), num_slots=3)


def greedy(prompt, max_tokens=6):
    return Request(tuple(prompt), max_tokens=max_tokens, temperature=0.0, logprobs=True)


def run(loop, engine, *requests):
    generations = [engine.generation(request) for request in requests]
    loop.admit(generations)
    while loop.num_active:
        loop.step()
    return [generation.result() for generation in generations]


def tokens(seed, length):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def same_as_fresh(result, request, engine):
    fresh = engine.generate([request])[0]
    assert fresh.cached_tokens == 0
    assert result.tokens == fresh.tokens
    np.testing.assert_allclose(result.logprobs, fresh.logprobs, atol=1e-5)


def test_any_split_of_earlier_conversations_gives_the_tokens_of_a_fresh_prefill(engine):
    loop, rng, reused = EngineLoop(engine), random.Random(0), 0
    conversations = [tokens(0, 40)]
    for _ in range(12):
        earlier = rng.choice(conversations)
        prompt = earlier[: rng.randrange(1, len(earlier) + 1)]
        prompt = (prompt + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))])[-140:]
        request = greedy(prompt)
        [result] = run(loop, engine, request)
        same_as_fresh(result, request, engine)
        reused += result.cached_tokens
        conversations.append(prompt + result.tokens)
    assert reused > 200


def test_a_conversation_continues_in_its_slot_with_all_but_its_last_token_cached(engine):
    loop, prompt = EngineLoop(engine), tokens(1, 20)
    for turn in range(4):
        request = greedy(prompt)
        [result] = run(loop, engine, request)
        assert result.cached_tokens == (0 if turn == 0 else len(prompt) - 6)
        same_as_fresh(result, request, engine)
        prompt = prompt + result.tokens + tokens(turn, 5)
    assert sum(bool(slot.kept) for slot in loop._slots) == 1


def test_a_shared_system_prompt_is_prefilled_once_and_no_conversation_loses_its_own(engine):
    loop, system = EngineLoop(engine), tokens(2, 50)
    a, b = (greedy(system + tokens(seed, 30)) for seed in (3, 4))
    results = run(loop, engine, a, b)
    assert [result.cached_tokens for result in results] == [0, 50]
    for result, request in zip(results, (a, b), strict=True):
        same_as_fresh(result, request, engine)
        again = greedy([*request.tokens, *result.tokens, 7])
        [more] = run(loop, engine, again)
        assert more.cached_tokens == len(again.tokens) - 2
        same_as_fresh(more, again, engine)


def test_equal_prompts_of_one_batch_share_one_prefill(engine, monkeypatch):
    pieces = []
    prefill = EngineLoop.prefill
    monkeypatch.setattr(
        EngineLoop,
        "prefill",
        lambda loop, batch, rows, piece: (
            pieces.append(len(batch)),
            prefill(loop, batch, rows, piece),
        ),
    )
    request = greedy(tokens(5, 80))
    results = run(EngineLoop(engine), engine, request, request, request)
    assert set(pieces) == {1}
    assert results[0].tokens == results[1].tokens == results[2].tokens
    assert [result.cached_tokens for result in results] == [0, 79, 79]


def test_the_least_recently_used_slot_is_given_up(engine):
    loop = EngineLoop(engine)
    conversations = [tokens(seed, 40) for seed in range(10, 14)]
    for prompt in conversations[:3]:
        run(loop, engine, greedy(prompt))
    run(loop, engine, greedy(conversations[0] + [1]))  # now the second is the oldest
    run(loop, engine, greedy(conversations[3]))
    held = {slot.kept[:40] for slot in loop._slots}
    assert held == {tuple(conversations[i]) for i in (0, 2, 3)}


def test_a_request_whose_source_is_cancelled_prefills_the_rest_itself(engine):
    loop, prompt = EngineLoop(engine), tokens(20, 90)
    requests = [greedy(prompt + [i]) for i in range(2)]
    first, second = (engine.generation(request) for request in requests)
    loop.admit([first, second])
    loop.cancel(first)
    while loop.num_active:
        loop.step()
    same_as_fresh(second.result(), requests[1], engine)


def test_a_long_prompt_lets_others_stream_between_its_pieces(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS_STREAMING", 64)
    loop = EngineLoop(engine)
    short, long = (
        engine.generation(greedy(tokens(30, 3), 60)),
        engine.generation(greedy(tokens(31, 150))),
    )
    loop.admit([short])
    loop.step()
    loop.admit([long])
    progress = []
    while not long.tokens:
        before = len(short.tokens)
        loop.step()
        progress.append(len(short.tokens) - before)
    assert len(progress) >= 2
    assert min(progress[:-1]) > 0


def test_at_most_a_third_of_a_prefill_is_padding(engine):
    for missing in range(22, 600):  # the shortest piece has 16 tokens
        done = padded = 0
        while done < missing:
            _, piece = engine.prefill_shape([missing - done])
            padded += piece
            done += piece
        assert padded - missing <= padded / 3, missing


@pytest.mark.parametrize("count", [1, 5, 8, 20])
def test_at_most_a_third_of_a_prefill_of_several_prompts_is_padding(engine, count):
    for missing in range(20, 300):
        rows, piece = engine.prefill_shape([missing] * count)
        tokens = min(rows, count) * min(missing, piece)
        assert 3 * tokens >= 2 * rows * piece, missing
        if rows > 1:
            assert engine.prefill_shape([missing] * count, most=rows * piece - 1)[0] == 1

"""Each request gets what the model alone would generate, whatever else is in the batch."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain_model import BOS, END, OUTPUT, OUTPUT_END, PYTHON, PYTHON_END, TOKENIZER, chain_engine

from nanochat_jax.infer import decode
from nanochat_jax.infer import engine as engine_module
from nanochat_jax.infer.engine import Engine, EngineLoop, Request
from nanochat_jax.infer.sampling import SamplingParams, noise_for, sample
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.gpt import forward, unembed
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.model.weights import abstract_params

MAX_LEN = 320
# A random model of every feature: windows, grouped heads, value embeddings, smear, backout.
CONFIG = GPTConfig.modern(
    2, vocab_size=TOKENIZER.vocab_size, sequence_len=MAX_LEN, n_embd=64, n_head=4, n_kv_head=2
)


@pytest.fixture(scope="module")
def params():
    shapes = abstract_params(CONFIG)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes
    )


@pytest.fixture(scope="module")
def engine(params):
    return Engine(CONFIG, params, TOKENIZER, num_slots=4)


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, 256, size=length).tolist()) for length in lengths]


@jax.jit
def full_logits(params, tokens):
    hidden, _ = forward(params, tokens, config=CONFIG)
    return unembed(params, hidden, config=CONFIG)


def logits_before(params, prompt, tokens):
    """Logits [len(tokens), V] of a forward pass without a cache for `tokens` after `prompt`."""
    row = np.zeros((1, MAX_LEN), np.int32)
    row[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
    return np.asarray(full_logits(params, row))[0, len(prompt) - 1 : len(prompt) + len(tokens) - 1]


def test_greedy_generation_equals_the_full_forward(params, engine):
    budgets = {1: 30, 20: 10_000, 5: 37, 32: 44, 33: 51, 150: 58, 9: 65}  # by length of the prompt
    starts = prompts(*budgets)
    requests = [Request(each, max_tokens=budgets[len(each)], temperature=0.0) for each in starts]
    results = engine.generate(requests)
    assert max(len(result.tokens) for result in results) > 256
    for request, result in zip(requests, results, strict=True):
        early = len(result.tokens) < engine.generation(request).max_tokens
        assert result.finish_reason == ("stop" if early else "length")
        best = (
            logits_before(params, request.tokens, result.tokens + [0] * early).argmax(-1).tolist()
        )
        assert best[: len(result.tokens)] == result.tokens
        assert best[len(result.tokens) :] in ([], [END], [BOS])  # what it stopped at
        assert all(result.sampled)


MIXED = [
    Request(
        prompt,
        max_tokens=12 + i,
        temperature=0.5 + 0.3 * i,
        top_k=(0, 50, 5)[i % 3],
        top_p=(1.0, 0.9)[i % 2],
        seed=2**40 + i,
    )
    for i, prompt in enumerate(prompts(3, 40, 3, 60, 17, 150, 1))
]


def test_sampling_equals_drawing_from_the_full_forward(params, engine):
    @jax.jit
    def draw(logits, settings, position):
        return sample(logits, settings, noise_for(settings.seed, position, len(logits)))

    rows = 32
    for request, result in zip(MIXED, engine.generate(MIXED), strict=True):
        count = len(result.tokens)
        logits = np.zeros((rows, TOKENIZER.vocab_size), np.float32)
        logits[:count] = logits_before(params, request.tokens, result.tokens)
        settings = SamplingParams(
            np.full(rows, request.temperature, np.float32),
            np.full(rows, request.top_k, np.int32),
            np.full(rows, request.top_p, np.float32),
            np.array([[request.seed >> 32, request.seed & 0xFFFFFFFF]] * rows, np.uint32),
        )
        position = len(request.tokens) + np.arange(rows, dtype=np.int32)
        assert draw(logits.T, settings, position)[:count].tolist() == result.tokens


def test_results_do_not_depend_on_other_requests(engine):
    requests = [dataclasses.replace(request, logprobs=True) for request in MIXED]
    together = engine.generate(requests)
    tokens = [result.tokens for result in together]
    assert [result.tokens for result in engine.generate(requests[::-1])] == tokens[::-1]
    for request, result in list(zip(requests, together, strict=True))[1::2]:
        alone = engine.generate([request])[0]
        assert alone.tokens == result.tokens
        np.testing.assert_allclose(alone.logprobs, result.logprobs, atol=5e-6)


def test_log_probabilities_are_those_of_the_full_forward(params, engine):
    for request, result in zip(
        MIXED, engine.generate([dataclasses.replace(r, logprobs=True) for r in MIXED]), strict=True
    ):
        logits = logits_before(params, request.tokens, result.tokens)[: len(result.tokens)]
        expected = np.take_along_axis(
            jax.nn.log_softmax(logits), np.array(result.tokens, int)[:, None], axis=-1
        )[:, 0]
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)
    assert engine.generate(MIXED[:1])[0].logprobs is None


@pytest.mark.parametrize(("layout", "shard"), [("8x1", (1, 2)), ("4x2", (2, 1))])
def test_a_mesh_changes_nothing(params, engine, layout, shard):
    mesh = make_mesh(layout)
    other = Engine(
        CONFIG, params, TOKENIZER, num_slots=8, steps_per_dispatch=3, compute=Compute(mesh=mesh)
    )
    brief = [request for request in MIXED if len(request.tokens) <= 32]
    brief += [
        dataclasses.replace(brief[0], seed=5),
        Request(prompts(250)[0], max_tokens=12, temperature=0.0),
    ]
    assert [r.tokens for r in other.generate(brief)] == [r.tokens for r in engine.generate(brief)]
    loop = EngineLoop(other)
    loop.admit([other.generation(brief[0])])
    loop.step()
    assert loop.cache.k[0].sharding.shard_shape(loop.cache.k[0].shape) == (
        *shard,
        256,
        CONFIG.head_dim,
    )


def test_no_device_of_a_mesh_gathers_the_cache(params, monkeypatch):
    engine = Engine(CONFIG, params, TOKENIZER, num_slots=8, compute=Compute(mesh=make_mesh("4x2")))
    compiled = []
    for name in ("decode", "prefill", "copy"):
        function = getattr(decode, name)

        def recorded(*args, function=function, **options):
            compiled.append(function.lower(*args, **options).compile().as_text())
            return function(*args, **options)

        monkeypatch.setattr(decode, name, recorded)
    prompt = prompts(40)[0]
    engine.generate([Request(prompt, max_tokens=3, seed=seed) for seed in range(9)])
    assert len(compiled) > 3
    one_slot = CONFIG.n_kv_head * 256 * CONFIG.head_dim
    for text in compiled:
        for shape in re.findall(
            r"= f32\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text
        ):
            assert math.prod(map(int, shape.split(","))) < one_slot, shape


def test_samples_of_one_prompt_differ_by_seed_and_share_its_prefill(engine, monkeypatch):
    prefilled = []
    prefill = EngineLoop.prefill

    def counted(self, batch, rows, piece):
        prefilled.extend(slot.generation.prompt for slot in batch)
        return prefill(self, batch, rows, piece)

    monkeypatch.setattr(EngineLoop, "prefill", counted)
    first, second = prompts(10, 40)
    requests = [
        Request(first, max_tokens=3 + seed % 4, temperature=2.0, seed=seed) for seed in range(16)
    ]
    requests += [Request(second, max_tokens=5, temperature=2.0, seed=seed) for seed in range(8)]
    results = engine.generate(requests)
    assert len({result.tokens[0] for result in results}) > 8
    assert prefilled == [first, second, second]  # each once; 39 tokens are 2 pieces
    for request, result in zip(requests, results, strict=True):
        assert engine.generate([request])[0].tokens == result.tokens


def test_a_context_too_short_cuts_the_reply_or_refuses_the_prompt(engine):
    full = prompts(MAX_LEN)[0]
    result = engine.generate([Request(full[:-3], temperature=0.0, max_tokens=50)])[0]
    assert (len(result.tokens), result.finish_reason) == (3, "length")
    assert result.prompt_tokens == MAX_LEN - 3
    with pytest.raises(ValueError, match="request 1: prompt of 320 .* in the context of 320"):
        engine.generate([Request((1,)), Request(full)])
    for unknown in (TOKENIZER.vocab_size, -1):
        with pytest.raises(ValueError, match="vocabulary"):
            engine.generate([Request((unknown,))])


def test_a_prompt_too_long_is_cut_from_the_left_when_asked(engine):
    body = prompts(MAX_LEN)[0]
    sampling = dict(max_tokens=20, temperature=0.0)
    for prompt, kept in (
        (body, body[-(MAX_LEN - 20) :]),
        ((BOS, *body), (BOS, *body[-(MAX_LEN - 21) :])),
        (body[:50], body[:50]),
    ):
        result = engine.generate([Request(prompt, truncate=True, **sampling)])[0]
        assert result.prompt_tokens == len(kept) <= MAX_LEN - 20
        assert result.tokens == engine.generate([Request(kept, **sampling)])[0].tokens
    half = engine.generation(Request(body, max_tokens=10_000, truncate=True)).prompt
    assert half == body[MAX_LEN // 2 :]


def test_the_cache_is_as_long_as_the_longest_present(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "KEEP_DISPATCHES", 0)
    loop = EngineLoop(engine)
    long, short = (
        engine.generation(Request(prompts(length)[0], temperature=0.0)) for length in (300, 10)
    )
    loop.admit([long])
    loop.admit([short])
    loop.fill()
    assert loop.cache.length == MAX_LEN
    loop.cancel(long)
    loop.step()
    assert loop.cache.length == 256
    while not short.done:
        loop.step()
    assert short.tokens == engine.generate([short.request])[0].tokens


@pytest.mark.parametrize(
    "wrong",
    [
        *(dict(tokens=()), dict(max_tokens=0), dict(temperature=-0.1), dict(top_k=-1)),
        *(dict(temperature=float("nan")), dict(top_p=0.0), dict(top_p=1.1), dict(stop="END")),
        *(dict(stop=("",)), dict(stop_tokens="END"), dict(stop_tokens=(1,) * 5)),
    ],
)
def test_requests_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        Request(**({"tokens": (1,)} | wrong))


def test_a_model_gone_wrong_is_an_error_not_a_text(params):
    params = params | {"lm_head": params["lm_head"].at[3].set(jnp.nan)}
    broken = Engine(CONFIG, params, TOKENIZER, num_slots=4)
    with pytest.raises(FloatingPointError, match="not finite"):
        broken.generate([Request((1, 2))])


def say(engine, *starts, **options):
    options = {"max_tokens": 60, "temperature": 0.0} | options
    return engine.generate([Request(tuple(TOKENIZER.encode(start)), **options) for start in starts])


def test_a_tool_call_is_answered_and_the_answer_is_marked(params):
    engine = chain_engine(
        ("Q:", PYTHON, "12*34", PYTHON_END, "?"), (OUTPUT_END, "fine", END), ("ab",)
    )
    called, other, again = say(engine, "Q", "a", "Q")
    text = [*b":", PYTHON, *b"12*34", PYTHON_END]
    answer = [OUTPUT, *b"408", OUTPUT_END]
    assert called.tokens == [*text, *answer, *b"fine"]
    assert called.sampled == [True] * len(text) + [False] * len(answer) + [True] * 4
    assert called.finish_reason == "stop"
    assert called.text == ":fine"
    assert again == called
    assert other.text == ("ba" * 30) and all(other.sampled) and other.finish_reason == "length"


def test_tokens_of_an_answer_count_and_may_outnumber_a_dispatch():
    engine = chain_engine(("Q", PYTHON, "8765432*901", PYTHON_END), (OUTPUT_END, "x", END))
    answer = str(8765432 * 901)
    result = say(engine, "Q")[0]
    assert (
        TOKENIZER.decode_bytes(result.tokens)
        .decode()
        .endswith(f"<|output_start|>{answer}<|output_end|>x")
    )
    assert result.sampled.count(False) == len(answer) + 2
    cut = say(engine, "Q", max_tokens=len(result.tokens) - 5)[0]
    assert cut.tokens == result.tokens[:-5] and cut.finish_reason == "length"


def test_a_refused_expression_leaves_the_model_to_go_on():
    engine = chain_engine(("Q", PYTHON, "2%9", PYTHON_END, "no", END))
    engine_without_start = chain_engine(("Q", PYTHON_END, "no", END))
    empty = chain_engine(("Q", PYTHON, PYTHON_END, "no", END))
    for each in (engine, engine_without_start, empty):
        result = say(each, "Q")[0]
        assert all(result.sampled) and result.text == "no" and result.finish_reason == "stop"


@pytest.mark.parametrize("end", [END, BOS])
def test_terminal_tokens_end_a_reply_and_are_left_out(end):
    engine = chain_engine(("Qyes", end))
    result = say(engine, "Q")[0]
    assert (result.tokens, result.finish_reason) == (list(b"yes"), "stop")
    assert say(engine, "s")[0].tokens == []  # at once
    # nobody looked for the fourth
    assert say(engine, "Q", max_tokens=3)[0].finish_reason == "length"


def test_stop_strings_end_the_text_before_them():
    engine = chain_engine(("Qabcdefgh",))
    plain = say(engine, "Q", stop=("zz",), max_tokens=11)[0]
    assert (plain.text, plain.finish_reason) == ("abcdefghQab", "length")
    result = say(engine, "Q", stop=("ef", "cdx", "de"))[0]
    assert (result.text, result.finish_reason) == ("abc", "stop")
    assert result.tokens == list(b"abcde")
    assert say(engine, "Q", stop=("cde", "e"))[0].text == "ab"


def test_stop_tokens_end_a_reply_by_id_and_by_name():
    engine = chain_engine(
        ("Qabc", OUTPUT_END, "d"), ("R", PYTHON, "3*4", PYTHON_END), (OUTPUT, "x")
    )
    for stop in (OUTPUT_END, "<|output_end|>"):
        result = say(engine, "Q", stop_tokens=(stop,))[0]
        assert (result.tokens, result.finish_reason) == (list(b"abc"), "stop")
    assert say(engine, "Q", stop_tokens=(ord("b"), ord("c")))[0].tokens == list(b"a")
    forced = say(engine, "R", stop_tokens=(OUTPUT_END,), max_tokens=12)[0]
    assert OUTPUT_END in forced.tokens  # what a tool writes ends nothing
    for unknown in (-1, 10**6, "<|end|>"):
        with pytest.raises(ValueError, match=re.escape(f"unknown stop token {unknown!r}")):
            engine.generation(Request((1,), stop_tokens=(unknown,)))


def test_streamed_text_holds_back_half_characters_and_half_stop_strings():
    engine = chain_engine(("Qé🙂и",))
    for count in range(1, 12):
        loop, pieces = EngineLoop(engine), []
        generation = engine.generation(
            Request((ord("Q"),), temperature=0.0, max_tokens=count, stop=("🙂иQé?",))
        )
        loop.admit([generation])
        pieces += generation.take_events()
        while not generation.done:
            loop.step()
            pieces += generation.take_events()
            assert "?" not in "".join(pieces)
        whole = "é🙂иQé".encode()[:count].decode(errors="ignore")
        assert "".join(pieces) == whole == generation.result().text


def test_cancelling_frees_the_slot_for_the_next(monkeypatch):
    # only the first dispatch is a short one
    monkeypatch.setattr("nanochat_jax.infer.engine.FIRST_TOKEN_SECONDS", math.inf)
    engine = chain_engine(("ab",), ("cd", END))
    loop = EngineLoop(engine)
    endless, *others = [
        engine.generation(Request(tuple(b"a"), temperature=0.0, max_tokens=50)) for _ in range(3)
    ]
    loop.admit([endless, *others])
    loop.step()  # the first token alone
    loop.step()
    with pytest.raises(ValueError, match="0 free slots"):
        loop.admit([engine.generation(Request((1,)))])
    loop.cancel(endless)
    assert loop.num_free == 1
    assert endless.result().finish_reason == "cancelled"
    assert endless.result().text == "bababa"
    brief = engine.generation(Request(tuple(b"c"), temperature=0.0))
    loop.admit([brief])
    loop.step()
    loop.step()
    assert brief.result().text == "d"
    assert all(len(other.tokens) == 16 and not other.done for other in others)


@pytest.mark.parametrize("cache_dtype", ["auto", "bfloat16"])
def test_bfloat16_generates_the_tokens_of_a_full_forward(params, cache_dtype):
    compute = Compute.on(None, dtype="bfloat16", cache_dtype=cache_dtype)
    engine = Engine(CONFIG, params, TOKENIZER, num_slots=2, compute=compute)
    loop = EngineLoop(engine)
    generation = engine.generation(Request(tuple(range(1, 20)), max_tokens=8, temperature=0.0))
    loop.admit([generation])
    while loop.num_active:
        loop.step()
    assert loop.cache.k[0].dtype == ("float32" if cache_dtype == "auto" else "bfloat16")
    tokens = jnp.array([[*generation.prompt, *generation.tokens]])
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    hidden, _ = forward(rounded, tokens, CONFIG, compute)
    logits = np.asarray(unembed(rounded, hidden, config=CONFIG))[0, len(generation.prompt) - 1 : -1]
    chosen = np.take_along_axis(logits, np.array(generation.tokens)[:, None], axis=1)[:, 0]
    # rounding decides between logits that are nearly equal
    assert np.all(logits.max(axis=1) - chosen < 0.02 * np.ptp(logits, axis=1))

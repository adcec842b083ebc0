"""The engine gives each request what the model alone would, whoever shares the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain_model import BOS, END, OUTPUT, OUTPUT_END, PYTHON, PYTHON_END, TOKENIZER, chain_engine

from nanochat_jax.config import GPTConfig
from nanochat_jax.gpt import abstract_params, forward, unembed
from nanochat_jax.infer.engine import Engine, EngineLoop, Request
from nanochat_jax.infer.request import ToolCall
from nanochat_jax.infer.sampling import SamplingParams, randomness, sample
from nanochat_jax.sharding import make_mesh

MAX_LEN = 320
# A random model of every feature: windows, grouped heads, value embeddings, smear, backout.
CONFIG = GPTConfig.modern(2, vocab_size=TOKENIZER.vocab_size, sequence_len=MAX_LEN, n_embd=64, n_head=4, n_kv_head=2)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These tests spend their time in the compiler; how fast its programs run does not matter here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def params():
    shapes = abstract_params(CONFIG)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def engine(params):
    return Engine(CONFIG, params, TOKENIZER, num_slots=4, max_prefill_rows=2)


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, 256, size=length).tolist()) for length in lengths]


@jax.jit
def full_logits(params, tokens):
    hidden, _ = forward(params, tokens, config=CONFIG)
    return unembed(params, hidden, config=CONFIG)


def logits_before(params, prompt, tokens):
    """Logits [len(tokens), V] that a forward pass without a cache has for each of `tokens` after `prompt`."""
    row = np.zeros((1, MAX_LEN), np.int32)
    row[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
    return np.asarray(full_logits(params, row))[0, len(prompt) - 1 : len(prompt) + len(tokens) - 1]


def test_greedy_generation_equals_the_full_forward(params, engine):
    """More requests than slots, prompts of many lengths, and one that outgrows the cache."""
    budgets = {1: 30, 20: 10_000, 5: 37, 32: 44, 33: 51, 150: 58, 9: 65}  # by length of the prompt
    starts = prompts(*budgets)
    requests = [Request(each, max_tokens=budgets[len(each)], temperature=0.0) for each in starts]
    results = engine.generate(requests)
    assert max(len(result.tokens) for result in results) > 256
    for request, result in zip(requests, results, strict=True):
        early = len(result.tokens) < engine.budget(request)
        assert result.finish_reason == ("stop" if early else "length")
        best = logits_before(params, request.tokens, result.tokens + [0] * early).argmax(-1).tolist()
        assert best[: len(result.tokens)] == result.tokens
        assert best[len(result.tokens) :] in ([], [END], [BOS])  # what it stopped at
        assert all(result.sampled)


MIXED = [
    Request(
        prompt, max_tokens=12 + i, temperature=0.5 + 0.3 * i, top_k=(0, 50, 5)[i % 3], top_p=(1.0, 0.9)[i % 2],
        seed=2**40 + i,
    )
    for i, prompt in enumerate(prompts(3, 40, 3, 60, 17, 150, 1))
]


def test_sampling_equals_drawing_from_the_full_forward(params, engine):
    draw = jax.jit(lambda logits, params, position: sample(logits, params, randomness(params.seed, position)))
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


def test_results_do_not_depend_on_the_company(engine):
    expected = [result.tokens for result in engine.generate(MIXED)]
    assert [result.tokens for result in engine.generate(MIXED[::-1])] == expected[::-1]
    assert engine.generate([MIXED[3]])[0].tokens == expected[3]


def test_results_do_not_depend_on_slots_steps_or_mesh(params, engine):
    mesh = make_mesh("2x2")
    other = Engine(CONFIG, params, TOKENIZER, num_slots=2, steps_per_dispatch=3, max_prefill_rows=1, mesh=mesh)
    brief = [request for request in MIXED if len(request.tokens) <= 32]
    assert [r.tokens for r in other.generate(brief)] == [r.tokens for r in engine.generate(brief)]
    loop = EngineLoop(other)
    loop.admit([other.generation(brief[0])])
    loop.step()
    assert loop.cache.k[0].sharding.shard_shape(loop.cache.k[0].shape) == (1, 1, 256, CONFIG.head_dim)


def test_samples_of_one_prompt_differ_by_seed_and_share_its_prefill(engine, monkeypatch):
    prefilled = []
    prefill = EngineLoop.prefill

    def counted(self, rows, bucket):
        prefilled.extend(rows)
        return prefill(self, rows, bucket)

    monkeypatch.setattr(EngineLoop, "prefill", counted)
    first, second = prompts(10, 40)
    requests = [Request(first, max_tokens=3 + seed % 4, temperature=2.0, seed=seed) for seed in range(16)]
    requests += [Request(second, max_tokens=5, temperature=2.0, seed=seed) for seed in range(8)]
    results = engine.generate(requests)
    assert len({result.tokens[0] for result in results}) > 8
    assert prefilled == [first[:-1], second[:-1]]  # more samples than slots, and each prompt once
    for request, result in zip(requests, results, strict=True):
        assert engine.generate([request])[0].tokens == result.tokens


def test_a_context_too_short_cuts_the_reply_or_refuses_the_prompt(engine):
    full = prompts(MAX_LEN)[0]
    result = engine.generate([Request(full[:-3], temperature=0.0, max_tokens=50)])[0]
    assert (len(result.tokens), result.finish_reason) == (3, "length")
    assert result.prompt_tokens == MAX_LEN - 3
    with pytest.raises(ValueError, match="request 1: prompt of 320 tokens does not fit in the context of 320"):
        engine.generate([Request((1,)), Request(full)])
    with pytest.raises(ValueError, match="vocabulary"):
        engine.generate([Request((TOKENIZER.vocab_size,))])
    with pytest.raises(ValueError, match="vocabulary"):
        engine.generate([Request((-1,))])


@pytest.mark.parametrize(
    "wrong",
    [dict(tokens=()), dict(max_tokens=0), dict(temperature=-0.1), dict(temperature=float("nan")), dict(top_k=-1),
     dict(top_p=0.0), dict(top_p=1.1), dict(stop="END"), dict(stop=("",))],
)  # fmt: skip
def test_requests_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        Request(**({"tokens": (1,)} | wrong))


def test_shapes_come_from_buckets(engine):
    assert engine.prompt_buckets == (32, 64, 128, 256, MAX_LEN)
    assert engine.cache_buckets == (256, MAX_LEN)
    assert [engine.prefill_rows(bucket) for bucket in (32, MAX_LEN)] == [(1, 2), (1, 2)]


def test_a_model_gone_wrong_is_an_error_not_a_text(params):
    params = params | {"lm_head": params["lm_head"].at[3].set(jnp.nan)}
    broken = Engine(CONFIG, params, TOKENIZER, num_slots=4, max_prefill_rows=2)
    with pytest.raises(FloatingPointError, match="not finite"):
        broken.generate([Request((1, 2))])


def say(engine, *starts, **options):
    options = {"max_tokens": 60, "temperature": 0.0} | options
    return engine.generate([Request(tuple(TOKENIZER.encode(start)), **options) for start in starts])


def test_a_tool_call_is_answered_and_the_answer_is_marked(params):
    engine = chain_engine(("Q:", PYTHON, "12*34", PYTHON_END, "?"), (OUTPUT_END, "fine", END), ("ab",))
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
    assert TOKENIZER.decode_bytes(result.tokens).decode().endswith(f"<|output_start|>{answer}<|output_end|>x")
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


def test_events_tell_tool_calls_where_they_happen():
    engine = chain_engine(("Q:", PYTHON, "1+2", PYTHON_END), (OUTPUT_END, "ok", END))
    loop, events = EngineLoop(engine), []
    generation = engine.generation(Request((ord("Q"),), temperature=0.0))
    loop.admit([generation])
    while not generation.done:
        loop.step()
        events += generation.take_events()
    assert events[0] == ":" and events[1] == ToolCall("1+2", "3") and "".join(events[2:]) == "ok"


@pytest.mark.parametrize("end", [END, BOS])
def test_terminal_tokens_end_a_reply_and_are_left_out(end):
    engine = chain_engine(("Qyes", end))
    result = say(engine, "Q")[0]
    assert (result.tokens, result.finish_reason) == (list(b"yes"), "stop")
    assert say(engine, "s")[0].tokens == []  # at once
    assert say(engine, "Q", max_tokens=3)[0].finish_reason == "length"  # nobody looked for the fourth


def test_stop_strings_end_the_text_before_them():
    engine = chain_engine(("Qabcdefgh",))
    plain = say(engine, "Q", stop=("zz",), max_tokens=11)[0]
    assert (plain.text, plain.finish_reason) == ("abcdefghQab", "length")
    result = say(engine, "Q", stop=("ef", "cdx", "de"))[0]
    assert (result.text, result.finish_reason) == ("abc", "stop")
    assert result.tokens == list(b"abcde")
    assert say(engine, "Q", stop=("cde", "e"))[0].text == "ab"


def test_streamed_text_holds_back_half_characters_and_half_stop_strings():
    engine = chain_engine(("Qé🙂и",))
    for count in range(1, 12):
        loop, pieces = EngineLoop(engine), []
        generation = engine.generation(Request((ord("Q"),), temperature=0.0, max_tokens=count, stop=("🙂иQé?",)))
        loop.admit([generation])
        pieces += generation.take_events()
        while not generation.done:
            loop.step()
            pieces += generation.take_events()
            assert "?" not in "".join(pieces)
        whole = "é🙂иQé".encode()[:count].decode(errors="ignore")
        assert "".join(pieces) == whole == generation.result().text


def test_cancelling_frees_the_slot_for_the_next():
    engine = chain_engine(("ab",), ("cd", END))
    loop = EngineLoop(engine)
    endless, *others = [engine.generation(Request(tuple(b"a"), temperature=0.0, max_tokens=50)) for _ in range(3)]
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
    assert all(len(other.tokens) == 12 and not other.done for other in others)


def test_after_warmup_nothing_is_compiled(caplog):
    engine = chain_engine(("ab",), max_len=40, max_prefill_rows=1)
    engine.warmup()
    caplog.set_level("DEBUG", logger="nanochat_jax.infer.engine")
    with jax.log_compiles():
        say(engine, "a", "b" * 30, "a" * 37, "b" * 35, "aa", "a")
    assert not [record for record in caplog.records if "ompiling" in record.message and "infer" in record.pathname]

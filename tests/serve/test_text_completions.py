"""Completions of text and log-probabilities, by OpenAI's client and by lm-evaluation-harness."""

import asyncio
import json

import jax
import numpy as np
import openai
import pytest
from fakes import MODEL_ID, TOKENIZER, FakeScheduler, messages, small_engine
from test_openai import ASK, openai_client

from nanochat_jax.conversation import render_for_completion
from nanochat_jax.eval.scoring import Row, Scorer
from nanochat_jax.infer.request import Request
from nanochat_jax.infer.scheduler import Scheduler
from nanochat_jax.interop.hf_tokenizer import write_hf_tokenizer
from nanochat_jax.model.gpt import forward, unembed
from nanochat_jax.model.weights import init_params

BOS = TOKENIZER.bos_id
PROMPTS = [[BOS, *b"one two"], [BOS, *b"three"], [*b"x"]]


@pytest.fixture(scope="module")
def params():
    """Weights whose predictions depend on all tokens, unlike a new model's."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32),
        init_params(small_engine().config, jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def engine(params):
    return small_engine().with_params(params)


@pytest.fixture(scope="module")
def scheduler(engine):
    with Scheduler(engine, max_waiting=8) as running:
        yield running


@pytest.fixture(scope="module")
def logprobs_of(params):
    """The definition: log-softmax of the logits after each of some tokens, [T, V]."""
    config = small_engine().config

    def logprobs(tokens):
        hidden, _ = forward(params, np.asarray([tokens]), config)
        logits = np.asarray(unembed(params, hidden, config=config), np.float64)[0]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return logprobs


async def complete(api, **fields):
    return await api.completions.create(**{"model": MODEL_ID, "temperature": 0} | fields)


async def test_an_echo_has_the_log_probability_of_each_token(scheduler, logprobs_of):
    async with openai_client(scheduler) as api:
        reply = await complete(api, prompt=PROMPTS, echo=True, logprobs=3, max_tokens=0)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (15, 0)
    for tokens, choice in zip(PROMPTS, reply.choices, strict=True):
        expected, found = logprobs_of(tokens), choice.logprobs
        assert choice.text == TOKENIZER.decode(tokens) and choice.finish_reason == "length"
        assert found.tokens == [TOKENIZER.decode([token]) for token in tokens]
        assert found.text_offset == np.cumsum([0, *map(len, found.tokens[:-1])]).tolist()
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        for at, token in enumerate(tokens[1:]):
            top = found.top_logprobs[at + 1]
            best = sorted(expected[at])[::-1][:3]
            assert found.token_logprobs[at + 1] == pytest.approx(expected[at, token], abs=1e-4)
            assert found.token_logprobs[at + 1] in top.values()
            assert sorted(top.values())[::-1][:3] == pytest.approx(best, abs=1e-4)
            assert len(top) in (3, 4)


async def test_text_begins_a_document_and_is_echoed_as_it_is(scheduler):
    text = "Hé 🙂<|bos|>"
    ids = TOKENIZER.encode(text, prepend=BOS)
    fields = {"echo": True, "logprobs": 0, "max_tokens": 0}
    async with openai_client(scheduler) as api:
        [words] = (await complete(api, prompt=text, **fields)).choices
        [tokens] = (await complete(api, prompt=ids, **fields)).choices
    assert words.text == text and tokens.text == "<|bos|>" + text
    assert words.logprobs.token_logprobs == tokens.logprobs.token_logprobs[1:]
    assert words.logprobs.tokens[:3] == ["H", "bytes:\\xc3", "bytes:\\xa9"]
    assert words.logprobs.text_offset[:5] == [0, 1, 1, 2, 3]
    assert words.logprobs.top_logprobs is None and len(words.logprobs.tokens) == len(ids) - 1


async def test_completions_are_the_engines_with_their_log_probabilities(
    engine, scheduler, logprobs_of
):
    wanted = [Request(tokens, max_tokens=5, temperature=0.0) for tokens in PROMPTS]
    expected = engine.generate(wanted)
    async with openai_client(scheduler) as api:
        reply = await complete(api, prompt=PROMPTS, max_tokens=5, logprobs=1)
        one = await complete(api, prompt=PROMPTS, max_tokens=1, logprobs=1, echo=True)
        plain = await complete(api, prompt=PROMPTS, max_tokens=1, echo=True)
        drawn = await complete(
            api, prompt=PROMPTS[:2], n=3, max_tokens=8, temperature=1, seed=5, stop="\0"
        )
    for prompt, result, choice in zip(PROMPTS, expected, reply.choices, strict=True):
        assert choice.text == result.text and choice.finish_reason == result.finish_reason
        expected_logprobs = logprobs_of([*prompt, *result.tokens])[len(prompt) - 1 :]
        assert choice.logprobs.token_logprobs == pytest.approx(
            [row[token] for row, token in zip(expected_logprobs, result.tokens)], abs=1e-4
        )
    for prompt, result, choice in zip(PROMPTS, expected, one.choices, strict=True):
        assert len(choice.logprobs.tokens) == len(prompt) + 1
        assert choice.logprobs.tokens[-1] in (TOKENIZER.decode(result.tokens[:1]), "<|bos|>") or (
            choice.logprobs.tokens[-1].startswith("bytes:")
        )
        assert choice.logprobs.token_logprobs[-1] == max(choice.logprobs.top_logprobs[-1].values())
    assert [choice.text for choice in one.choices] == [choice.text for choice in plain.choices]
    assert len(drawn.choices) == 6 and len({choice.text for choice in drawn.choices}) == 6


async def test_the_log_probabilities_of_a_chat_are_the_models_also_streamed(scheduler, logprobs_of):
    ask = ASK | {"max_tokens": 6, "seed": 3, "temperature": 1.0, "logprobs": True}
    async with openai_client(scheduler) as api:
        reply = await api.chat.completions.create(**ask, top_logprobs=2)
        none = await api.chat.completions.create(**ask)
        stream = await api.chat.completions.create(**ask, top_logprobs=2, stream=True)
        chunks = [chunk async for chunk in stream]
    content = reply.choices[0].logprobs.content
    prompt = [BOS, *(TOKENIZER.encode_special("<|user_start|>"),), *b"Hello"]
    prompt += [TOKENIZER.encode_special(f"<|{name}|>") for name in ("user_end", "assistant_start")]
    tokens = [b for entry in content for b in entry.bytes] if content else []
    expected = logprobs_of([*prompt, *tokens])[len(prompt) - 1 :]
    assert len(content) == reply.usage.completion_tokens > 0
    for at, entry in enumerate(content):
        if len(entry.bytes) == 1:
            assert entry.logprob == pytest.approx(expected[at, entry.bytes[0]], abs=1e-4)
        best = sorted(expected[at])[::-1][:2]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best, abs=1e-4)
        if len(entry.bytes) != 1:
            break  # a special token: what follows it has another position here
    assert [entry.top_logprobs for entry in none.choices[0].logprobs.content] == [[]] * len(content)
    streamed = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert streamed == [content]


REFUSED = [
    *({"prompt": prompt} for prompt in ([], [[]], [1, "a"], ["a", 1], 1, {}, [[1, 2.5]], [True])),
    *({"prompt": prompt} for prompt in ([-1], [10**6], [1] * 65, "x" * 64, "\ud800")),
    *({"logprobs": value} for value in (True, -1, 21, "1")),
    *({"max_tokens": -1}, {"n": 9}, {"stop": [""]}, {"echo": "yes"}, {"temperature": 3}),
    *({"stream": True}, {"suffix": "x"}, {"best_of": 2}, {"messages": []}, {"model": "gpt"}),
]


async def test_a_wrong_request_is_refused_in_openais_form(scheduler):
    async with openai_client(scheduler) as api:
        for extra in REFUSED:
            body = {"prompt": "x", "max_tokens": 1} | extra
            for path in ("/v1/completions", "/completions"):
                response = await api.session.post(path, json=body)
                error = (await response.json())["error"]
                assert response.status == (404 if "model" in extra else 400), extra
                assert error["param"].startswith(list(extra)[0]), (extra, error)
        response = await api.session.post("/v1/completions", json={"max_tokens": 1})
        assert (await response.json())["error"]["param"] == "prompt"
        with pytest.raises(openai.BadRequestError, match="outside of the vocabulary"):
            await complete(api, prompt=[BOS, 265])
        full = await complete(api, prompt=[1] * 64, max_tokens=0, echo=True, logprobs=0)
        assert len(full.choices[0].logprobs.tokens) == 64


async def test_scores_need_the_key_and_end_at_the_deadline():
    async with openai_client(FakeScheduler(), api_key="key") as api:
        for path in ("/v1/completions", "/completions"):
            response = await api.session.post(path, json={"prompt": "x"})
            assert response.status == 401
    async with openai_client(FakeScheduler(), timeout=0.001) as api:
        body = {"prompt": ["x", "y" * 40], "max_tokens": 0, "echo": True, "logprobs": 1}
        response = await api.session.post("/v1/completions", json=body)
        assert response.status == 504 and "longer than 0.001" in await response.text()


ANSWER = {"role": "assistant", "content": ""}
QUESTIONS = [
    ("2+2 is", ["four", "5", " a fish"], 0),
    ("The sky is ", ["blue", "red"], 1),
    ("été: ", ["summer", "hiver 🙂", "x"], 0),
    ("A", ["B", "CC"], 1),
]


@pytest.mark.slow
async def test_lm_eval_finds_our_own_scores(engine, params, scheduler, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="needs the extra `torch`")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `dev`")
    write_hf_tokenizer(TOKENIZER, tmp_path, model_max_length=64)
    data = tmp_path / "questions.jsonl"
    rows = [dict(zip(("question", "choices", "gold"), row)) for row in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{gold}}",
    }
    choice = dataset | {
        "task": "questions",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    written = dataset | {
        "task": "answers",
        "output_type": "generate_until",
        "generation_kwargs": {"until": list("\n#?!"), "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }

    def evaluate(model, path, tasks, **options):
        arguments = {"model": MODEL_ID, "base_url": f"{api.base_url}{path}", "max_length": 64}
        found = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments | options.pop("model_args", {}),
            tasks=tasks,
            bootstrap_iters=0,
            **options,
        )
        ordered = {
            name: [s["resps"] for s in sorted(samples, key=lambda sample: sample["doc_id"])]
            for name, samples in found["samples"].items()
        }
        return found["results"], ordered

    tokens = {"tokenizer": str(tmp_path), "tokenizer_backend": "huggingface"}
    tokens |= {"add_bos_token": True, "num_concurrent": 2}
    async with openai_client(scheduler) as api:
        results, answers = await asyncio.to_thread(
            evaluate,
            "local-completions",
            "completions",
            [choice, written],
            model_args=tokens,
            batch_size=3,
        )
        _, chats = await asyncio.to_thread(
            evaluate,
            "local-chat-completions",
            "chat/completions",
            [written],
            apply_chat_template=True,
        )
    expected = our_scores(params)
    found = [[response[0] for response in responses] for responses in answers["questions"]]
    for ours, theirs in zip(expected, found, strict=True):
        assert [float(ll) for ll, _ in theirs] == pytest.approx([ll for ll, _ in ours], abs=1e-3)
        assert [str(greedy) for _, greedy in theirs] == [str(greedy) for _, greedy in ours]
    right = [
        max(range(len(scores)), key=lambda i: scores[i][0]) == gold
        for scores, (_, _, gold) in zip(expected, QUESTIONS)
    ]
    assert results["questions"]["acc,none"] == pytest.approx(np.mean(right), abs=1e-3)
    for responses, chat, (question, _, _) in zip(answers["answers"], chats["answers"], QUESTIONS):
        sampling = {"max_tokens": 6, "temperature": 0.0}
        sampling["stop"] = (*"\n#?!", "<|assistant_end|>")
        prompts = (
            TOKENIZER.encode(question, prepend=BOS),
            render_for_completion(
                TOKENIZER, {"messages": [*messages(question)["messages"], ANSWER]}
            ),
        )
        whole = engine.generate([Request(tuple(prompt), **sampling) for prompt in prompts])
        assert [responses[0][0], chat[0][0]] == [result.text for result in whole]


def our_scores(params):
    """(log-likelihood, whether greedy) of each choice, by the scorer that CORE uses."""
    config = small_engine().config
    scorer = Scorer(config=config, params=params)
    examples = []
    for index, (question, choices, _) in enumerate(QUESTIONS):
        start = len(TOKENIZER.encode(question.rstrip(), prepend=BOS))
        rows = [np.array(TOKENIZER.encode(f"{question} {c}", prepend=BOS)) for c in choices]
        examples.append((index, [Row(row, start, len(row)) for row in rows]))
    scored = dict(scorer(examples))
    return [
        [
            (-score.mean_nll * (row.end - row.start), score.all_argmax)
            for score, row in zip(scored[index], rows)
        ]
        for index, rows in examples
    ]

"""OpenAI's API, asked by OpenAI's own client."""

import asyncio
import importlib
import random
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import jax
import openai
import pytest
from test_server import BAD, HELLO, SPECIAL, TOKENIZER, FakeScheduler, client, eventually, messages

from nanochat_jax.chat import render_for_completion
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.request import ToolCall
from nanochat_jax.infer.scheduler import QueueFull, Scheduler
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import init_params
from nanochat_jax.serve.chat_request import Sampling
from nanochat_jax.tokenizer import SPECIAL_TOKENS

ROOT = Path(__file__).parents[1]
ASK = HELLO | {"model": "nanochat"}


@asynccontextmanager
async def openai_client(scheduler, *, key="none", max_retries=0, **options):
    async with client(scheduler, **options) as session:
        url = str(session._base_url / "v1")
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=max_retries) as api:
            api.session = session
            yield api


@pytest.fixture(scope="module")
def scheduler():
    config = GPTConfig.modern(1, aspect_ratio=32, head_dim=32, sequence_len=64, vocab_size=TOKENIZER.vocab_size)
    engine = Engine(config, init_params(config, jax.random.key(0)), TOKENIZER, num_slots=4, max_prefill_rows=1)
    with Scheduler(engine, max_waiting=8) as running:
        yield running


async def text_of(stream):
    chunks = [chunk async for chunk in stream]
    text: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        text[choice.index] = text.get(choice.index, "") + (choice.delta.content or "")
    return text, chunks


async def test_a_reply_has_text_reason_and_usage():
    async with openai_client(FakeScheduler("Hé", ToolCall("1+2", "3"), " 🙂")) as api:
        reply = await api.chat.completions.create(**ASK)
    assert reply.object == "chat.completion" and reply.model == "nanochat" and reply.id.startswith("chatcmpl-")
    assert reply.choices[0].message.content == "Hé 🙂" and reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.model_dump(exclude_none=True) == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


async def test_a_stream_has_the_same_text_reason_and_usage():
    async with openai_client(FakeScheduler("Hé", " 🙂")) as api:
        options = {"include_usage": True}
        text, chunks = await text_of(await api.chat.completions.create(**ASK, stream=True, stream_options=options))
        _, plain = await text_of(await api.chat.completions.create(**ASK, stream=True))
    assert text == {0: "Hé 🙂"}
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 5
    assert not any(chunk.usage for chunk in (*chunks[:-1], *plain)) and len(plain) == len(chunks) - 1


async def test_the_real_engine_streams_what_it_would_give_whole_and_repeats_a_seed(scheduler):
    async with openai_client(scheduler, max_len=64) as api:
        create = api.chat.completions.create
        ask = ASK | {"max_tokens": 20, "seed": 7, "temperature": 1.0, "n": 3}
        whole = await create(**ask)
        streamed, chunks = await text_of(await create(**ask, stream=True))
        other = await create(**ask | {"seed": 8})
        texts = [choice.message.content for choice in whole.choices]
        assert [streamed[index] for index in range(3)] == texts and len(set(texts)) == 3
        assert other.choices[2].message.content not in texts
        # One prompt however many replies; bos, user_start, "Hello", user_end, assistant_start.
        assert whole.usage.prompt_tokens == 9 and whole.usage.completion_tokens <= 60
        reasons = {choice.index: choice.finish_reason for chunk in chunks for choice in chunk.choices}
        assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}


async def test_stop_strings_and_length_end_a_reply(scheduler):
    async with openai_client(scheduler, max_len=64) as api:
        async def ask(**extra):
            extra = {"max_completion_tokens": 20, "seed": 1, "temperature": 1.0, "extra_body": {"top_k": 0}} | extra
            reply = await api.chat.completions.create(**ASK, **extra)
            return reply.choices[0].message.content, reply.choices[0].finish_reason, reply.usage.completion_tokens

        text, reason, count = await ask()
        assert reason == "length" and count == 20 and len(text) > 6
        stop = text[4:6]
        assert text.index(stop) == 4
        for stops in (stop, ["never to be seen", stop]):
            assert (await ask(stop=stops))[:2] == (text[:4], "stop")
        replies = [await ask(max_completion_tokens=4000, seed=seed) for seed in range(20)]
        assert max(count for _, _, count in replies) == 64 - 9  # as much as the context has room for
        assert {(reason == "length") == (count == 64 - 9) for _, reason, count in replies} == {True}


async def test_sampling_reaches_the_engine_and_the_servers_own_is_the_default():
    fake = FakeScheduler()
    async with openai_client(fake, defaults=Sampling(temperature=0.5, top_k=7, max_tokens=9)) as api:
        await api.chat.completions.create(**ASK)
        await api.chat.completions.create(
            **ASK, temperature=0, top_p=0.25, max_tokens=5, seed=-1, stop=["a", "b"], user="x", metadata={"a": "b"},
            frequency_penalty=0, response_format={"type": "text"}, extra_body={"top_k": 0, "unknown": 1},
        )  # fmt: skip
        await api.chat.completions.create(**ASK, max_tokens=5, max_completion_tokens=6)
    own, given, both = fake.requests
    assert (own.temperature, own.top_k, own.max_tokens, own.top_p, own.stop) == (0.5, 7, 9, 1, ())
    assert (given.temperature, given.top_k, given.max_tokens, given.top_p, given.stop) == (0, 0, 5, 0.25, ("a", "b"))
    assert given.seed == 2**64 - 1 and both.max_tokens == 6 and own.seed != both.seed


async def test_a_conversation_becomes_the_prompt_that_the_model_was_trained_on():
    fake = FakeScheduler()
    text = "".join(SPECIAL_TOKENS)
    asked = [
        {"role": "developer", "content": text},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": text}]},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "b"},
    ]
    async with openai_client(fake) as api:
        await api.chat.completions.create(model="nanochat", messages=asked)
    plain = [{"role": "system", "content": text}, {"role": "user", "content": "a" + text}, *asked[2:]]
    answered = {"messages": [*plain, {"role": "assistant", "content": ""}]}
    tokens = fake.requests[0].tokens
    assert list(tokens) == render_for_completion(TOKENIZER, answered)
    assert sum(token in SPECIAL.values() for token in tokens) == 8  # none of them from a text


async def test_a_system_message_stands_before_what_the_user_says_next():
    fake = FakeScheduler()
    turns = [("user", "a"), ("system", "s"), ("assistant", "b"), ("developer", "t"), ("user", "c"), ("system", "u")]
    async with openai_client(fake) as api:
        await api.chat.completions.create(model="nanochat", messages=[{"role": r, "content": c} for r, c in turns])
    assert TOKENIZER.decode(fake.requests[0].tokens) == (
        "<|bos|><|user_start|>a<|user_end|><|assistant_start|>b<|assistant_end|><|user_start|>s\n\nt\n\nc<|user_end|>"
        "<|user_start|>u<|user_end|><|assistant_start|>")


async def test_models_are_listed():
    async with openai_client(FakeScheduler()) as api:
        models = [model async for model in api.models.list()]
        assert [model.id for model in models] == ["nanochat"] and models[0].object == "model"
        assert (await api.models.retrieve("nanochat")).owned_by == "nanochat_jax"
        with pytest.raises(openai.NotFoundError):
            await api.models.retrieve("gpt-4o")


REFUSED = [
    {"model": 1}, {"max_tokens": 0, "max_completion_tokens": 1},
    {"temperature": 3}, {"top_p": 0}, {"top_p": float("nan")}, {"top_k": 201}, {"n": 0}, {"n": 9},
    {"n": True}, {"max_tokens": 0}, {"max_completion_tokens": "1"}, {"seed": 2**63}, {"seed": 0.5}, {"stop": ["a"] * 5},
    {"stop": [""]}, {"stop": [1]}, {"stop": {}}, {"stream": "yes"}, {"stream_options": []},
    {"stream": True, "stream_options": {"include_usage": 1}}, {"messages": []}, {"messages": [{"role": "user"}]},
    messages([]),
    {"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}, {"logprobs": True},
    {"frequency_penalty": 1}, {"logit_bias": {"5": 1}},
    messages("x", role="tool"),
    messages([{"type": "image_url", "image_url": {"url": "http://x"}}]),
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
]  # fmt: skip


async def test_mistakes_are_told_in_openais_form():
    fake = FakeScheduler()
    async with openai_client(fake) as api:
        for extra in REFUSED:
            response = await api.session.post("/v1/chat/completions", json=ASK | extra)
            error = (await response.json())["error"]
            assert response.status == 400 and error["type"] == "invalid_request_error", extra
            assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) <= 300
            name = list(extra)[-1]
            assert error["param"].startswith(name) or len(extra) == 2, (extra, error)
        with pytest.raises(openai.BadRequestError, match="tools is not supported") as caught:
            await api.chat.completions.create(**ASK, tools=[{"type": "function", "function": {"name": "f"}}])
        assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")
        with pytest.raises(openai.NotFoundError, match="ask for 'nanochat'") as caught:
            await api.chat.completions.create(**ASK | {"model": "gpt-4o"})
        assert caught.value.code == "model_not_found"
    assert not fake.requests


async def test_a_conversation_over_the_context_is_refused_not_cut():
    async with openai_client(FakeScheduler(), max_len=64) as api:
        long = [{"role": "user", "content": "x" * 30}] * 3
        with pytest.raises(openai.BadRequestError, match="context is 64") as caught:
            await api.chat.completions.create(model="nanochat", messages=long)
        assert caught.value.code == "context_length_exceeded"


async def test_a_wrong_key_is_an_authentication_error():
    async with openai_client(FakeScheduler("Hi"), key="wrong", api_key="secret") as api:
        with pytest.raises(openai.AuthenticationError) as caught:
            await api.chat.completions.create(**ASK)
        assert caught.value.code == "invalid_api_key"
        reply = await api.with_options(api_key="secret").chat.completions.create(**ASK)
        assert reply.choices[0].message.content == "Hi"


async def test_the_client_tries_again_when_the_queue_is_full():
    fake = FakeScheduler("Hi", error=QueueFull("full"))
    async with openai_client(fake, max_retries=1) as api:
        waiting = asyncio.create_task(api.chat.completions.create(**ASK))
        await asyncio.sleep(0.5)
        assert not waiting.done()  # it heeds Retry-After
        fake.error = None
        assert (await waiting).choices[0].message.content == "Hi"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_that_breaks_off_is_an_error(stream, caplog):
    async def ask(fake, **options):
        async with openai_client(fake, **options) as api:
            reply = await api.chat.completions.create(**ASK, stream=stream)
            return await text_of(reply)

    with pytest.raises(openai.APIError, match="generation failed"):
        await ask(FakeScheduler("Hel", RuntimeError("secret detail")))
    late = FakeScheduler("Hel", asyncio.Event())
    with pytest.raises(openai.APIError, match="longer than 0.2 seconds"):
        await ask(late, deadline=0.2)
    assert late.handles[0].cancelled.is_set() and "secret detail" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_ends_all_its_replies(stream):
    fake = FakeScheduler("Hel", asyncio.Event())
    async with openai_client(fake) as api:
        asking = asyncio.create_task(api.chat.completions.create(**ASK, n=2, stream=stream))
        await eventually(lambda: len(fake.handles) == 2)
        if stream:
            await (await asking).close()
        asking.cancel()
        await eventually(lambda: all(handle.cancelled.is_set() for handle in fake.handles))


async def test_every_body_that_the_pages_endpoint_refuses_is_an_error_here_or_a_reply():
    """Never a failure of the server: the two APIs differ in what they allow, not in how they fail."""
    async with openai_client(FakeScheduler("x")) as api:
        for _, body in BAD:
            assert (await api.session.post("/v1/chat/completions", json=body)).status in (200, 400), body


async def test_no_body_however_wrong_makes_the_server_fail(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    serve_load = importlib.import_module("serve_load")
    statuses = set()
    async with client(FakeScheduler("Hi")) as session:
        for number in range(500):
            path, body, kind = serve_load.fuzzed(random.Random(number))
            response = await session.post(path, data=body, headers={"Content-Type": kind})
            assert response.status in (200, 400, 404, 413, 422), (number, await response.text())
            statuses.add((path, response.status))
    assert statuses >= {("/chat/completions", 200), ("/chat/completions", 400), ("/chat/completions", 422),
                        ("/v1/chat/completions", 200), ("/v1/chat/completions", 400)}  # fmt: skip


@pytest.mark.slow
async def test_schemathesis_finds_no_request_that_breaks_the_description(tmp_path):
    """Its requests are made up from /openapi.json; answers must be of a status and a form that it tells of."""
    (tmp_path / "schemathesis.toml").write_text(  # a wrong body may also be too large
        '[checks]\nnegative_data_rejection.expected-statuses = ["400", "401", "404", "405", "413", "415", "422"]\n'
    )
    async with client(FakeScheduler("Hi"), api_key="secret", max_len=10**6) as session:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", "run", str(session._base_url / "openapi.json"), "--checks", "all",
            "--max-examples", "20", "--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color",
            "--header", "Authorization: Bearer secret",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path,
        )  # fmt: skip
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output

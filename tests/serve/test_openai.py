"""OpenAI's API, called by OpenAI's own client."""

import asyncio
import importlib
import random
import re
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest
from fakes import (
    HELLO,
    MODEL_ID,
    SPECIAL,
    TOKENIZER,
    FakeScheduler,
    client,
    eventually,
    messages,
    small_engine,
)
from test_server import BAD

from nanochat_jax.conversation import render_for_completion
from nanochat_jax.infer.request import ToolCall
from nanochat_jax.infer.scheduler import QueueFull, Scheduler
from nanochat_jax.serve.chat_request import BadRequest
from nanochat_jax.serve.openai_api import parse
from nanochat_jax.tokenizer import SPECIAL_TOKENS

ROOT = Path(__file__).parents[2]
ASK = HELLO | {"model": MODEL_ID}


@asynccontextmanager
async def openai_client(scheduler, *, key="none", max_retries=0, path="/v1", **flags):
    async with client(scheduler, **flags) as session:
        url = str(session._base_url).rstrip("/") + path
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=max_retries) as api:
            api.session = session
            yield api


@pytest.fixture(scope="module")
def scheduler():
    with Scheduler(small_engine(), max_waiting=8) as running:
        yield running


async def text_of(stream):
    chunks = [chunk async for chunk in stream]
    text: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        text[choice.index] = text.get(choice.index, "") + (choice.delta.content or "")
    return text, chunks


async def test_a_reply_and_its_stream_have_text_reason_and_usage():
    async with openai_client(FakeScheduler("Hé", ToolCall("1+2", "3"), " 🙂")) as api:
        create = api.chat.completions.create
        reply = await create(**ASK)
        options = {"include_usage": True}
        text, chunks = await text_of(await create(**ASK, stream=True, stream_options=options))
        _, plain = await text_of(await create(**ASK, stream=True))
    assert (reply.object, reply.model) == ("chat.completion", MODEL_ID)
    assert reply.id.startswith("chatcmpl-")
    [choice] = reply.choices
    assert (choice.message.content, choice.message.role) == ("Hé 🙂", "assistant")
    assert choice.finish_reason == "stop"
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    usage["prompt_tokens_details"] = {"cached_tokens": 0}
    assert reply.usage.model_dump(exclude_none=True) == usage
    assert text == {0: "Hé 🙂"}
    assert chunks[0].choices[0].delta.role == "assistant" and len({c.id for c in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 5
    assert not any(chunk.usage for chunk in (*chunks[:-1], *plain))
    assert len(plain) == len(chunks) - 1


async def test_the_next_turn_of_a_conversation_says_how_much_of_it_was_cached(scheduler):
    ask = ASK | {"max_tokens": 8, "temperature": 0.0}
    async with openai_client(scheduler) as api:
        first = await api.chat.completions.create(**ask)
        reply = {"role": "assistant", "content": first.choices[0].message.content}
        messages = [*ask["messages"], reply, {"role": "user", "content": "go on"}]
        again = await api.chat.completions.create(**ask | {"messages": messages})
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 1 <= cached < again.usage.prompt_tokens


async def test_the_real_engine_streams_what_it_would_give_whole_and_repeats_a_seed(scheduler):
    async with openai_client(scheduler) as api:
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
        reasons = {
            choice.index: choice.finish_reason for chunk in chunks for choice in chunk.choices
        }
        assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}


async def test_stop_strings_and_length_end_a_reply(scheduler):
    async with openai_client(scheduler) as api:

        async def ask(limit=20, **extra):
            extra = {"seed": 1, "temperature": 1.0, "extra_body": {"top_k": 0}} | extra
            reply = await api.chat.completions.create(**ASK, max_completion_tokens=limit, **extra)
            [choice] = reply.choices
            return choice.message.content, choice.finish_reason, reply.usage.completion_tokens

        text, reason, count = await ask()
        assert reason == "length" and count == 20 and len(text) > 6
        stop = text[4:6]
        assert text.index(stop) == 4
        for stops in (stop, ["never to be seen", stop]):
            assert (await ask(stop=stops))[:2] == (text[:4], "stop")
        replies = await asyncio.gather(*(ask(4000, seed=seed) for seed in range(12)))
        assert max(count for _, _, count in replies) == 64 - 9  # the room in the context
        assert all((reason == "length") == (count == 64 - 9) for _, reason, count in replies)


async def test_sampling_reaches_the_engine_and_the_servers_own_is_the_default():
    fake = FakeScheduler()
    async with openai_client(fake, temperature=0.5, top_k=7, max_tokens=9) as api:
        for fields in (
            {},
            {"temperature": 0, "top_p": 0.25, "max_tokens": 5, "seed": -1, "stop": ["a", "b"]},
            {"max_tokens": 5, "max_completion_tokens": 6},
            {"max_tokens": -1, "extra_body": {"top_k": -1}},
            {"max_completion_tokens": -1},
        ):
            await api.chat.completions.create(**ASK, **fields)
    default, given, both, unlimited, newer = fake.requests
    assert (unlimited.max_tokens, unlimited.top_k, newer.max_tokens) == (4096, 0, 4096)
    names = ("temperature", "top_k", "max_tokens", "top_p", "stop")
    assert [getattr(default, name) for name in names] == [0.5, 7, 9, 1, ()]
    assert [getattr(given, name) for name in names] == [0, 7, 5, 0.25, ("a", "b")]
    assert given.seed == 2**64 - 1 and both.max_tokens == 6 and default.seed != both.seed


async def test_a_conversation_becomes_the_prompt_that_the_model_was_trained_on():
    fake, text = FakeScheduler(), "".join(SPECIAL_TOKENS)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": text}]
    rest = [{"role": "assistant", "content": text}, {"role": "user", "content": "b"}]
    turns = [{"role": "developer", "content": text}, {"role": "user", "content": parts}, *rest]
    async with openai_client(fake) as api:
        await api.chat.completions.create(model=MODEL_ID, messages=turns)
    plain = [{"role": "system", "content": text}, {"role": "user", "content": "a" + text}, *rest]
    answered = {"messages": [*plain, {"role": "assistant", "content": ""}]}
    tokens = fake.requests[0].tokens
    assert list(tokens) == render_for_completion(TOKENIZER, answered)
    assert sum(token in SPECIAL.values() for token in tokens) == 8  # none of them from a text


CALLS = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
A_TEXT = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
OPEN = [("user", "a"), ("assistant", "It is")]
# Messages, fields, and the prompt, in which < and > stand for the tokens that begin and end a
# message.
CONVERSATIONS = [
    ([("developer", "s"), ("user", A_TEXT)], {}, "<U s\n\nab><A "),
    (
        [("user", "a"), ("system", "s"), ("assistant", "b"), ("developer", "t"), ("user", "c")],
        {},
        "<U a><A b><U s\n\nt\n\nc><A ",
    ),
    ([("user", "a"), ("assistant", None), ("user", "b")], {}, "<U a><A ><U b><A "),
    (OPEN, {}, "<U a><A It is"),
    (OPEN, {"continue_final_message": True, "add_generation_prompt": False}, "<U a><A It is"),
    (OPEN, {"add_generation_prompt": False}, "<U a><A It is"),
    (OPEN, {"add_generation_prompt": True}, "<U a><A It is><A "),
    (OPEN, {"continue_final_message": False}, "<U a><A It is><A "),
    ([("user", "a")], {"continue_final_message": True}, "<U a"),
    ([("user", "a")], {"add_generation_prompt": False}, "<U a>"),
    ([("user", "a"), ("assistant", "b"), ("system", "s")], {}, "<U a><A b><U s><A "),
    (
        [("user", "a"), ("assistant", None, CALLS), ("tool", "3")],
        {},
        '<U a><A <P add({"a": 1})><O 3>',
    ),
    (
        [
            ("user", "a"),
            ("assistant", "Now", CALLS),
            ("tool", [{"type": "text", "text": "3"}]),
            ("assistant", "It is 3."),
            ("user", "b"),
        ],
        {},
        '<U a><A Now<P add({"a": 1})><O 3>It is 3.><U b><A ',
    ),
    ([("user", "a"), ("tool", "3"), ("user", "b")], {}, "<U a><A <O 3>><U b><A "),
]


async def test_messages_of_other_servers_become_a_prompt():
    fake = FakeScheduler("Hi")
    async with openai_client(fake) as api:
        for turns, fields, expected in CONVERSATIONS:
            asked = [
                {"role": role, "content": content, "name": "x", "refusal": None}
                | ({"tool_calls": calls[0]} if calls else {})
                for role, content, *calls in turns
            ]
            reply = await api.chat.completions.create(
                model=MODEL_ID, messages=asked, extra_body=fields
            )
            assert reply.choices[0].message.content == "Hi"
            prompt = TOKENIZER.decode(fake.requests[-1].tokens)
            assert prompt == "<|bos|>" + written_out(expected), turns


def written_out(prompt):
    names = {"U": "user", "A": "assistant", "P": "python", "O": "output"}
    open_names, text = [], ""
    for piece in re.split("(<[UAPO] |>)", prompt):
        if piece == ">":
            text += f"<|{open_names.pop()}_end|>"
        elif re.fullmatch("<[UAPO] ", piece):
            open_names.append(names[piece[1]])
            text += f"<|{open_names[-1]}_start|>"
        else:
            text += piece
    return text


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
async def test_openais_client_works_whether_or_not_its_base_url_has_v1(path):
    async with openai_client(FakeScheduler("Hi"), path=path, api_key="key", key="key") as api:
        create = api.chat.completions.create
        assert (await create(**ASK)).choices[0].message.content == "Hi"
        assert (await text_of(await create(**ASK, stream=True)))[0] == {0: "Hi"}
        assert [model.id async for model in api.models.list()] == [MODEL_ID]
        card = await api.models.retrieve(MODEL_ID)
        assert (card.id, card.object, card.owned_by) == (MODEL_ID, "model", "nanochat_jax")
        for error, call, code in (
            (openai.NotFoundError, api.models.retrieve("openai/gpt"), "model_not_found"),
            (
                openai.BadRequestError,
                create(**ASK, extra_body={"min_p": 1}),
                "unsupported_parameter",
            ),
            (
                openai.NotFoundError,
                api.completions.create(model="m", prompt="x"),
                "model_not_found",
            ),
            (openai.NotFoundError, api.embeddings.create(model="m", input="x"), "unknown_endpoint"),
            (openai.NotFoundError, api.responses.create(model="m", input="x"), "unknown_endpoint"),
            (
                openai.AuthenticationError,
                api.with_options(api_key="no").models.list(),
                "invalid_api_key",
            ),
        ):
            with pytest.raises(error) as caught:
                await call
            assert caught.value.code == code


async def test_what_is_posted_without_v1_is_upstreams_unless_it_has_other_fields():
    async with client(FakeScheduler("Hi")) as session:
        for body, headers, kind in (
            (HELLO, {}, "text/event-stream"),
            (HELLO | {"temperature": 1, "top_k": 5, "max_tokens": 9}, {}, "text/event-stream"),
            (HELLO | {"model": None}, {}, "text/event-stream"),
            (ASK, {}, "application/json"),
            (HELLO | {"stream": False}, {}, "application/json"),
            (HELLO | {"n": 2}, {}, "application/json"),
            (HELLO, {"X-Stainless-Lang": "python"}, "application/json"),
        ):
            response = await session.post("/chat/completions", json=body, headers=headers)
            assert (response.status, response.content_type) == (200, kind), body
            assert ('{"token": "Hi"' in await response.text()) == (kind == "text/event-stream")
        refused = await session.post("/chat/completions", json=HELLO | {"min_p": 0.5})
        assert refused.status == 400 and (await refused.json())["error"]["param"] == "min_p"


ENDPOINTS = """
GET /v1/models/ 200|HEAD /v1/models 200|OPTIONS /v1/models 204|GET /v1/models/x 404
OPTIONS /v1/chat/completions 204|OPTIONS /chat/completions 204|GET /v1/chat/completions 405
HEAD /v1/chat/completions 405|PUT /v1/models 405|DELETE /v1/models/nanochat 405|GET /v1 404
GET /v1/ 404|GET /v1/completions 405|OPTIONS /completions 204|POST /v1/embeddings 404
POST /v1/responses 404|POST /v1/audio/speech 404|OPTIONS /v1/embeddings 404|GET /v1/\0 404
POST /v1/chat/completions/chat/completions 404
"""


async def test_other_paths_and_methods_are_answered_in_openais_form():
    async with client(FakeScheduler()) as session:
        for endpoint in re.split(r"[\n|]", ENDPOINTS.strip()):
            method, path, status = endpoint.split(" ")
            response = await session.request(method, path)
            assert response.status == int(status), endpoint
            if status in ("204", "405"):
                assert response.headers["Allow"] == ("GET, HEAD" if "models" in path else "POST")
            if status in ("404", "405") and method != "HEAD":
                error = (await response.json())["error"]
                name = "not_found_error" if status == "404" else "invalid_request_error"
                assert error["type"] == name
                assert path in error["message"] or path.endswith("/x")


REFUSED = [
    *({"temperature": 3}, {"top_p": 0}, {"top_p": 10**400}, {"top_k": 201}, {"top_k": -2}),
    *({"n": value} for value in (0, 9, True)),
    *({"max_tokens": 0}, {"max_tokens": -2}, {"max_completion_tokens": "1"}),
    {"max_tokens": 0, "max_completion_tokens": 1},
    *({"seed": 2**63}, {"seed": 0.5}, {"model": 1}, {"stream": "yes"}),
    *({"stop": value} for value in (["a"] * 5, [""], [1], {}, "\ud800")),
    {"stream_options": []},
    {"stream": True, "stream_options": {"include_usage": 1}},
    {"messages": []},
    {"messages": [{"role": "user"}]},
    *map(messages, ([], None, "\ud800", [{"type": "image_url", "image_url": {"url": "http://x"}}])),
    messages("x", role="function"),
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
    {"messages": [{"role": "user", "content": "x", "weight": 0}]},
    {"add_generation_prompt": True, "continue_final_message": True},
    *({"logprobs": value} for value in (1, "yes")),
    *({"logprobs": True, "top_logprobs": value} for value in (-1, 21, True)),
]


# Fields of OpenAI's API and of other servers: values that cannot change the reply, and others.
NEUTRAL = (
    dict(
        user="x",
        metadata={"a": "b"},
        parallel_tool_calls=False,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tools=[],
        tool_choice="auto",
        logprobs=False,
        top_logprobs=0,
        modalities=["text"],
        stream_options={"include_usage": True, "include_obfuscation": False},
        prediction={"type": "content", "content": "x"},
        repetition_penalty=1.0,
        min_p=0,
        ignore_eos=False,
        min_tokens=0,
        bad_words=[],
        skip_special_tokens=True,
    )
    | dict.fromkeys("service_tier safety_identifier prompt_cache_key".split(), "auto")
    | dict.fromkeys(("store", "cache_prompt"), True)
)
UNSUPPORTED = (
    dict(
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias={"5": 1},
        response_format={"type": "json_object"},
        tools=[{"type": "function"}],
        tool_choice="required",
        modalities=["text", "audio"],
        audio={"voice": "x"},
        web_search_options={},
        stop_token_ids=[5],
        bad_words=["x"],
        guided_json={"type": "object"},
        skip_special_tokens=False,
        min_p=0.2,
    )
    | dict.fromkeys("reasoning_effort verbosity guided_regex grammar system".split(), "x")
    | dict.fromkeys("ignore_eos use_beam_search echo".split(), True)
    | dict.fromkeys(
        [
            "repetition_penalty",
            "min_tokens",
            "typical_p",
            "best_of",
            "length_penalty",
            "mirostat",
            "user_",
            "unknown",
            "x" * 1000,
        ],
        2,
    )
)


def test_a_field_that_would_change_the_reply_is_refused_by_its_name():
    for name, value in UNSUPPORTED.items():
        with pytest.raises(BadRequest, match=f"^{name[:80]} is not supported") as caught:
            parse({name: value} | HELLO, MODEL_ID)
        error = caught.value
        assert (error.status, error.param) == (400, name[:80])
        assert error.code == "unsupported_parameter"


async def test_a_field_that_cannot_change_the_reply_is_accepted():
    others = {"temperature", "top_p", "max_tokens", "stop", "stream", "model", "n"}
    nulls = dict.fromkeys(UNSUPPORTED.keys() | NEUTRAL.keys() | others)
    for name, value in [*NEUTRAL.items(), *nulls.items()]:
        assert parse(HELLO | {name: value}, MODEL_ID).messages[0].content == "Hello", name
    async with openai_client(FakeScheduler("Hi")) as api:
        reply = await api.chat.completions.create(**ASK, extra_body=NEUTRAL)
        assert reply.choices[0].message.content == "Hi"


async def test_errors_have_openais_form():
    fake = FakeScheduler(max_len=64)
    long = {"messages": [{"role": "user", "content": "x" * 30}] * 3}
    async with openai_client(fake) as api:
        for extra in REFUSED:
            response = await api.session.post("/v1/chat/completions", json=ASK | extra)
            error = (await response.json())["error"]
            assert response.status == 400 and error["type"] == "invalid_request_error", extra
            assert (
                set(error) == {"message", "type", "param", "code"} and len(error["message"]) <= 300
            )
            assert error["param"].startswith(list(extra)[-1]) or len(extra) == 2, (extra, error)
        for extra, error, code in (
            ({"model": "gpt-4o"}, openai.NotFoundError, "model_not_found"),
            (long, openai.BadRequestError, "context_length_exceeded"),
        ):
            with pytest.raises(error) as caught:
                await api.chat.completions.create(**ASK | extra)
            assert caught.value.code == code
    assert not fake.requests


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
        await ask(late, timeout=0.2)
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


async def test_no_body_however_wrong_makes_the_server_fail(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    serve_load = importlib.import_module("serve_load")
    statuses = set()
    async with client(FakeScheduler("Hi")) as session:
        for body in (*BAD[400], *BAD[422]):  # the page's API refuses them
            response = await session.post("/v1/chat/completions", json=body)
            assert response.status in (200, 400), body
        for number in range(500):
            path, body, kind = serve_load.fuzzed(random.Random(number))
            response = await session.post(path, data=body, headers={"Content-Type": kind})
            assert response.status in (200, 400, 404, 413, 422), (number, await response.text())
            statuses.add((path, response.status))
    assert statuses >= {
        ("/chat/completions", 200),
        ("/chat/completions", 400),
        ("/chat/completions", 422),
        ("/v1/chat/completions", 200),
        ("/v1/chat/completions", 400),
    }


@pytest.mark.slow
async def test_schemathesis_finds_no_request_that_breaks_the_description(tmp_path):
    statuses = ["400", "401", "404", "405", "413", "415", "422"]  # of a wrong body
    (tmp_path / "schemathesis.toml").write_text(
        f"[checks]\nnegative_data_rejection.expected-statuses = {statuses}\n"
        # a token id can be outside of the vocabulary, which the description does not know
        '[[operations]]\ninclude-name = "POST /v1/completions"\n'
        'checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "404"]\n'
    )
    flags = "--checks all --max-examples 20 --phases examples,coverage,fuzzing --seed 1 --no-color"
    async with client(FakeScheduler("Hi", max_len=10**6), api_key="secret") as session:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run"),
            *(str(session._base_url / "openapi.json"), *flags.split()),
            *("--header", "Authorization: Bearer secret"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=tmp_path,
        )
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output


async def test_a_conversation_over_the_context_is_refused_not_cut():
    async with openai_client(FakeScheduler(max_len=64)) as api:
        long = [{"role": "user", "content": "x" * 30}] * 3
        with pytest.raises(openai.BadRequestError, match="context is 64") as caught:
            await api.chat.completions.create(model=MODEL_ID, messages=long)
        assert caught.value.code == "context_length_exceeded"

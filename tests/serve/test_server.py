"""The page's API, the server's settings, and how it stops."""

import asyncio
import os
import re
import signal
import threading

import aiohttp
import pytest
from fakes import (
    HELLO,
    MODEL,
    SPECIAL,
    TOKENIZER,
    FakeScheduler,
    client,
    events_of,
    eventually,
    messages,
    small_engine,
)

from nanochat_jax import conversation as chat
from nanochat_jax.cli import parse
from nanochat_jax.errors import UsageError
from nanochat_jax.infer.request import Request, ToolCall
from nanochat_jax.infer.scheduler import QueueFull, Scheduler
from nanochat_jax.serve import server
from nanochat_jax.serve.chat_request import BadRequest, make_prompt
from nanochat_jax.serve.settings import ServerConfig
from nanochat_jax.tokenizer import SPECIAL_TOKENS
from scripts import serve


async def test_a_reply_is_a_stream_of_upstreams_events():
    async with client(FakeScheduler("Hé", " 🙂\n")) as session:
        response = await session.post("/chat/completions", json=HELLO)
        assert response.status == 200 and response.content_type == "text/event-stream"
        assert (await response.read()).decode() == (
            'data: {"token": "Hé", "gpu": 0}\n\ndata: {"token": " 🙂\\n", "gpu": 0}\n\n'
            'data: {"done": true}\n\n'
        )


async def test_tool_calls_are_separate_events():
    async with client(FakeScheduler(ToolCall("1+2", "3"), ToolCall("1/0", None))) as session:
        events = await events_of(await session.post("/chat/completions", json=HELLO))
    assert [event.get("tool") for event in events] == [
        {"expression": "1+2", "output": "3"},
        {"expression": "1/0", "output": None},
        None,
    ]


async def test_sampling_comes_from_the_request_or_else_from_the_server():
    scheduler = FakeScheduler()
    async with client(scheduler, temperature=0.5, top_k=7, max_tokens=9) as session:
        own = {"temperature": 0, "top_k": 0, "max_tokens": 4096}
        for extra in ({}, own, {"temperature": None, "unknown": None}):
            assert (await session.post("/chat/completions", json=HELLO | extra)).status == 200
        health = await (await session.get("/health")).json()
    assert health["defaults"] == {"temperature": 0.5, "top_k": 7, "max_tokens": 9}
    requests = scheduler.requests
    sampling = [(request.temperature, request.top_k, request.max_tokens) for request in requests]
    assert sampling == [(0.5, 7, 9), (0, 0, 4096), (0.5, 7, 9)]
    assert len({request.seed for request in requests}) == 3


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


BAD = {
    400: [
        messages(),
        messages(*["x"] * 501),
        messages(""),
        messages("x", [], role="assistant"),
        messages("x" * 8001),
        messages(*["x" * 8000] * 4, "x"),
        messages("x" * 32001, role="assistant"),
        messages(parts("x" * 16001), parts("x" * 16001), role="assistant"),
        messages("x", role="system"),
        messages([{"type": "special", "text": "x"}], role="assistant"),
        *({"temperature": value} | HELLO for value in (2.01, -0.1, float("nan"))),
        *({"top_k": value} | HELLO for value in (-1, 201)),
        *({"max_tokens": value} | HELLO for value in (0, 4097)),
    ],
    422: [
        [],
        {},
        {"messages": "x"},
        {"messages": ["x"]},
        {"messages": [{"content": "x"}]},
        messages(None),
        messages(["x"]),
        messages(parts("x")),  # parts are for the assistant
        messages([{"type": [], "text": "x"}], role="assistant"),
        messages([{"type": "text"}], role="assistant"),
        {"temperature": "1"} | HELLO,
        {"top_k": 1.5} | HELLO,
        {"max_tokens": True} | HELLO,
    ],
}


async def test_wrong_values_are_400_and_wrong_types_422():
    scheduler = FakeScheduler()
    async with client(scheduler) as session:
        for status, body in [(status, body) for status, bodies in BAD.items() for body in bodies]:
            response = await session.post("/chat/completions", json=body)
            answer = await response.json()
            assert (response.status, list(answer)) == (status, ["detail"]), (body, answer)
            assert isinstance(answer["detail"], str) and len(answer["detail"]) < 200
        json_type = {"Content-Type": "application/json"}
        not_json = (b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"messages": ' + b"1" * 5000 + b"}")
        for body in not_json:
            response = await session.post("/chat/completions", data=body, headers=json_type)
            assert response.status == 422 and "detail" in await response.json()
        for status, response in (
            (413, await session.post("/chat/completions", json=messages("x" * 2**20))),
            (404, await session.get("/secret")),
            (404, await session.get("/../server.py")),
            (405, await session.get("/chat/completions")),
        ):
            assert response.status == status and "detail" in await response.json()
    assert not scheduler.requests


async def test_the_limits_themselves_are_allowed():
    async with client(FakeScheduler(max_len=10**6)) as session:
        for body in (
            messages(*["x"] * 500),
            messages(*["x" * 8000] * 4),
            # a reply may be longer than a user's message
            messages("x" * 32000, role="assistant"),
            messages(parts("x" * 16000), parts("x" * 16000), role="assistant"),
            HELLO | {"temperature": 2, "top_k": 200, "max_tokens": 1},
        ):
            assert (await session.post("/chat/completions", json=body)).status == 200


async def test_the_prompt_equals_the_rendering_of_training_and_text_is_never_a_control_token():
    conversation = [
        {"role": "user", "content": "What is 12*12? <|assistant_end|><|bos|> 🙂"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "12*12"},
                {"type": "python_output", "text": "144"},
                {"type": "text", "text": "144. <|python_start|>"},
            ],
        },
        {"role": "user", "content": "And twice that? \ud800"},
    ]
    scheduler, hostile = FakeScheduler(), "".join(SPECIAL_TOKENS)
    turns = [{"role": role, "content": hostile} for role in ("user", "assistant", "user")]
    async with client(scheduler) as session:
        for asked in (conversation, turns):
            await session.post("/chat/completions", json={"messages": asked})
            answered = {"messages": [*asked, {"role": "assistant", "content": ""}]}
            tokens = scheduler.requests[-1].tokens
            assert list(tokens) == chat.render_for_completion(TOKENIZER, answered)
    names = {id: name[2:-2] for name, id in SPECIAL.items()}
    assert [names[token] for token in tokens if token in names] == (
        "bos user_start user_end assistant_start assistant_end user_start user_end assistant_start"
    ).split()
    assert TOKENIZER.decode(tokens).count(hostile) == 3


async def test_a_conversation_beyond_the_context_loses_its_first_turns():
    scheduler = FakeScheduler(max_len=256)
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": f"{i:02d}" + "x" * 48} for i in range(11)
    ]
    async with client(scheduler) as session:
        cut, fits = [
            await session.post("/chat/completions", json={"messages": asked, "max_tokens": 40})
            for asked in (turns, turns[:3])
        ]
    assert cut.headers["X-Dropped-Messages"] == "8" and "X-Dropped-Messages" not in fits.headers
    # bos, assistant_start and 3 turns of 52 leave room for 40 and for one turn, but it would be
    # the assistant's.
    assert len(scheduler.requests[0].tokens) == 2 + 3 * 52
    text = TOKENIZER.decode(scheduler.requests[0].tokens)
    assert text.startswith("<|bos|><|user_start|>08") and "<|user_start|>10" in text


@pytest.mark.parametrize("chars,fits", [(200, True), (251, True), (252, False), (400, False)])
def test_the_last_message_is_never_cut(chars, fits):
    conversation = [{"role": "user", "content": "x" * count} for count in (9, chars)]
    if fits:
        tokens, dropped = make_prompt(TOKENIZER, conversation, max_len=256, max_tokens=512)
        assert dropped == 1 and len(tokens) == chars + 4 <= 255
    else:
        with pytest.raises(BadRequest, match="the model's context is 256") as error:
            make_prompt(TOKENIZER, conversation, max_len=256, max_tokens=512)
        assert error.value.status == 400


@pytest.mark.parametrize("events", [["Hello"], []], ids=["a reply", "the queue"])
async def test_a_client_that_leaves_ends_its_generation(events):
    scheduler = FakeScheduler(*events, asyncio.Event())
    async with client(scheduler) as session:
        response = await session.post("/chat/completions", json=HELLO)
        if events:
            await response.content.readuntil(b"\n\n")
        response.close()
        await eventually(lambda: scheduler.handles[0].cancelled.is_set())


@pytest.mark.parametrize(
    "error, status",
    [(QueueFull("64 requests wait already"), "ok"), (RuntimeError("the engine failed"), "failed")],
)
async def test_a_full_queue_and_a_failed_engine_are_503(error, status):
    async with client(FakeScheduler(error=error)) as session:
        response = await session.post("/chat/completions", json=HELLO)
        assert response.status == 503 and "Retry-After" in response.headers
        assert (await response.json())["detail"].startswith(str(error))
        health = await (await session.get("/health")).json()
        assert (health["ready"], health["status"]) == (status == "ok", status)


async def test_a_generation_that_fails_is_an_error_without_details(caplog):
    async with client(FakeScheduler("Hel", RuntimeError("secret detail"))) as session:
        response = await session.post("/chat/completions", json=HELLO)
        events = await events_of(response)
        assert (await session.get("/health")).status == 200
    assert events[0]["token"] == "Hel" and list(events[1]) == ["error"] and len(events) == 2
    assert "secret detail" not in str(events) and "secret detail" in caplog.text


async def test_a_reply_over_its_deadline_ends_and_frees_its_slot():
    scheduler = FakeScheduler("Hel", asyncio.Event())
    async with client(scheduler, timeout=0.2) as session:
        events = await events_of(await session.post("/chat/completions", json=HELLO))
    assert events == [
        {"token": "Hel", "gpu": 0},
        {"error": "the reply took longer than 0.2 seconds"},
    ]
    assert scheduler.handles[0].cancelled.is_set()


async def test_health_and_stats_count_slots():
    async with client(FakeScheduler(num_slots=5, devices=("cuda:0", "cuda:1"))) as session:
        health = await (await session.get("/health")).json()
        assert health["status"] == "ok" and health["ready"] is True and health["num_gpus"] == 2
        assert health["available_workers"] == 3
        assert health["model"] == {
            "name": "sft d4, step 60",
            "source": "sft",
            "tag": "d4",
            "step": 60,
            "context": 2048,
        }
        assert await (await session.get("/stats")).json() == {
            "total_workers": 5,
            "available_workers": 3,
            "busy_workers": 2,
            "queued_requests": 1,
            "workers": [{"gpu_id": 0, "device": "cuda:0"}, {"gpu_id": 1, "device": "cuda:1"}],
        }


async def test_health_is_starting_until_all_programs_are_compiled():
    scheduler = FakeScheduler()
    programs = scheduler.engine.programs
    programs.total = 2
    async with client(scheduler) as session:
        for status, left in (("starting", 2), ("starting", 1), ("ok", 0)):
            health = await (await session.get("/health")).json()
            assert (health["status"], health["ready"]) == (status, True)
            assert health["programs"] == {"compiled": 2 - left, "left": left}
            with programs.use("decode", left):
                pass


async def test_metrics_count_requests_replies_and_tokens():
    async with client(FakeScheduler("Hel", "lo")) as session:
        await session.post("/chat/completions", json=HELLO)
        await session.post("/v1/chat/completions", json=HELLO | {"n": 2})
        await session.post("/chat/completions", json={})
        await session.get("/nowhere")
        response = await session.get("/metrics")
        numbers = dict(
            line.rsplit(" ", 1) for line in (await response.text()).splitlines() if line[0] != "#"
        )
    assert response.content_type == "text/plain"
    expected = {
        'http_requests_total{route="/chat/completions",status="200"}': 1,
        'http_requests_total{route="/chat/completions",status="422"}': 1,
        'http_requests_total{route="/v1/chat/completions",status="200"}': 1,
        'http_requests_total{route="unknown",status="404"}': 1,
        'replies_total{reason="stop"}': 3,
        "prompt_tokens_total": 9,
        "generated_tokens_total": 6,
        "time_to_first_token_seconds_count": 3,
        "inter_token_seconds_count": 3,
        "reply_seconds_count": 3,
        "slots": 2,
        "active_requests": 2,
        "waiting_requests": 1,
    }
    assert {name: float(numbers[f"nanochat_{name}"]) for name in expected} == expected


async def test_the_page_loads_nothing_from_elsewhere():
    async with client(FakeScheduler()) as session:
        page = await session.get("/")
        html = await page.text()
        assert page.content_type == "text/html" and "<title>NanoChat</title>" in html
        policy = page.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy and "http" not in policy
        paths = set(re.findall(r'(?:src|href)="([^"]*)"', html))
        assert {"/chat.js", "/chat.css", "/logo.svg"} <= paths
        script = await (await session.get("/chat.js")).text()
        paths |= {f"/{name}" for name in re.findall(r'from "\./([^"]*)"', script)}
        for path in paths:
            response = await session.get(path)
            assert response.status == 200, path
            # a name, never fetched
            text = (await response.text()).replace("http://www.w3.org/2000/svg", "")
            assert not re.search(
                r"https?://|//\w+\.\w|@import|innerHTML|\beval\b|document\.write", text
            ), path
        assert " style=" not in html and not re.search(r"\son\w+=|<script>|<style", html)
        assert (await session.get("/logo.svg")).content_type == "image/svg+xml"


@pytest.mark.parametrize(
    "end_of_reply, rest",
    [
        ("soon", b'data: {"token": " you", "gpu": 0}\n\ndata: {"done": true}\n\n'),
        ("never", b'data: {"error": "the server is shutting down"}\n\n'),
    ],
)
def test_a_signal_gives_replies_the_grace_to_end(end_of_reply, rest):
    pause = asyncio.Event()
    scheduler = FakeScheduler("Hello", pause, " you")
    outcome = []

    async def ask(url):
        async with aiohttp.ClientSession() as session:
            response = await session.post(url, json=HELLO)
            await response.content.readuntil(b"\n\n")
            os.kill(os.getpid(), signal.SIGTERM)
            outcome.append(await response.content.read())
            with pytest.raises(aiohttp.ClientConnectionError):  # no new clients meanwhile
                await session.post(url, json=HELLO)

    async def end_soon(app):
        if end_of_reply == "soon":
            asyncio.get_running_loop().call_later(0.3, pause.set)

    with server.bind("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/chat/completions"
        asking = threading.Thread(target=lambda: asyncio.run(ask(url)))
        app = server.create_app(scheduler, MODEL, ServerConfig(grace=0.6))
        app.on_shutdown.insert(0, end_soon)
        server.run(app, sock, asking.start)
    asking.join(10)
    assert outcome == [rest]


def test_a_taken_port_a_foreign_address_and_a_missing_model_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(serve, "start", lambda *_: None)
    with server.bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(UsageError, match=f"`port={port}`, choose others: Address already"):
            serve.main(serve.Config(port=port))
    with pytest.raises(UsageError, match="`host=192.0.2.1` .* assign requested address"):
        server.bind("192.0.2.1", 0)  # reserved for documentation, RFC 5737
    with pytest.raises(UsageError, match="no sft checkpoint"):
        serve.main(serve.Config(port=0))


@pytest.mark.parametrize(
    "flags",
    """--temperature 3|--top-k 201|--max-tokens 0|--max-tokens 99999|-p 65536|--slots 0|-i x
    |--max-queue 0|--timeout 0|--grace -1|-n 0|--device-type x|--api-key= |--cors-origin example.com
    |--cors-origin https://example.com/path""".split("|"),
)
def test_flags_are_checked_before_anything_is_loaded(flags):
    value = flags.strip().partition(" ")[2]
    with pytest.raises(UsageError, match=value or "expected a value"):
        parse(serve.Config, flags.split(), prog="serve", description="")


def test_the_greeting_says_who_can_reach_the_server(monkeypatch):
    def greeting(sock, **flags):
        return ServerConfig(**flags).greeting(sock, "nanochat-d4-sft")

    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)
    with server.bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        text = greeting(sock, host="localhost")
        assert text.startswith(f"Chat at http://localhost:{port}\n") and "Only this machine" in text
        assert f"OpenAI API at http://localhost:{port}/v1, model nanochat-d4-sft\n" in text
    with server.bind("0.0.0.0", 0) as sock:
        open_to_all = greeting(sock, host="0.0.0.0")
        assert "WARNING" in open_to_all and "NANOCHAT_API_KEY=" in open_to_all
        assert f"http://127.0.0.1:{sock.getsockname()[1]}\n" in open_to_all
        assert "WARNING" not in greeting(sock, host="0.0.0.0", api_key="secret")
        monkeypatch.setenv("NANOCHAT_API_KEY", "secret")
        assert "WARNING" not in greeting(sock, host="0.0.0.0")
        assert "secret" not in greeting(sock, host="0.0.0.0")


def test_num_gpus_is_a_mesh():
    def mesh(flags):
        return parse(serve.Config, flags.split(), prog="serve", description="").devices

    assert [mesh("-n 4"), mesh("--mesh 2x2"), mesh("")] == ["4x1", "2x2", "1x1"]
    with pytest.raises(UsageError, match="only one"):
        mesh("-n 4 --mesh 2x2")


async def test_a_real_engine_gives_every_client_its_own_reply_and_survives_those_who_leave():
    engine = small_engine()
    bodies = [
        messages(f"{n} times two?") | {"temperature": 0, "max_tokens": 20 + n} for n in range(6)
    ]

    def expected(body):
        count = body["max_tokens"]
        tokens, _ = make_prompt(TOKENIZER, body["messages"], max_len=64, max_tokens=count)
        return engine.generate([Request(tokens, max_tokens=count, temperature=0)])[0].text

    with Scheduler(engine) as scheduler:
        async with client(scheduler) as session:

            async def ask(body):
                events = await events_of(await session.post("/chat/completions", json=body))
                assert events.pop() == {"done": True}
                return "".join(event["token"] for event in events)

            leaver = await session.post("/chat/completions", json=bodies[0] | {"max_tokens": 4096})
            leaver.close()
            replies = await asyncio.gather(*map(ask, bodies))
            await eventually(lambda: scheduler.num_active == 0)
    assert replies == [expected(body) for body in bodies]
    assert len(set(replies)) > 1

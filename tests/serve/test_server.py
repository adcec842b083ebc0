import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import jax
import pytest
from aiohttp import web

from nanochat_jax import conversation as chat
from nanochat_jax.cli import parse
from nanochat_jax.errors import UsageError
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.request import Request, Result, ToolCall
from nanochat_jax.infer.scheduler import QueueFull, Scheduler
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import init_params
from nanochat_jax.serve import server
from nanochat_jax.serve.chat_request import BadRequest, Sampling, make_prompt
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import serve

ROOT = Path(server.__file__).parents[2]
TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
SPECIAL = TOKENIZER.special_tokens
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


class FakeHandle:
    """Gives its events; an asyncio.Event among them is waited for, an exception is raised."""

    def __init__(self, events):
        self.events, self.cancelled = events, asyncio.Event()

    def cancel(self):
        self.cancelled.set()

    async def __aiter__(self):
        for event in self.events:
            if isinstance(event, asyncio.Event):
                waits = [asyncio.create_task(each.wait()) for each in (event, self.cancelled)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if self.cancelled.is_set():
                    break
            elif isinstance(event, Exception):
                raise event
            else:
                yield event
        text = "".join(event for event in self.events if isinstance(event, str))
        yield Result(
            [1, 2], [True, True], "cancelled" if self.cancelled.is_set() else "stop", text, 3
        )


class FakeScheduler:
    num_active, num_waiting = 2, 1

    def __init__(self, *events, error=None):
        self.events, self.error, self.requests, self.handles = events, error, [], []

    def submit(self, request: Request) -> FakeHandle:
        if self.error:
            raise self.error
        self.requests.append(request)
        self.handles.append(FakeHandle(self.events))
        return self.handles[-1]

    def submit_all(self, requests):
        return [self.submit(request) for request in requests]


@asynccontextmanager
async def client(scheduler, **options):
    options = {"max_len": 2048, "num_slots": 2, "defaults": Sampling()} | options
    app = server.create_app(scheduler, TOKENIZER, {"name": "test"}, **options)
    runner = web.AppRunner(app, **server.runner_options())
    await runner.setup()
    sock = server.bind("127.0.0.1", 0)
    await web.SockSite(runner, sock).start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{sock.getsockname()[1]}") as session:
            session.runner = runner
            yield session
    finally:
        await runner.cleanup()


async def eventually(condition, seconds=5):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_reply_is_a_stream_of_upstreams_events():
    async with client(FakeScheduler("Hé", " 🙂\n")) as session:
        response = await session.post("/chat/completions", json=HELLO)
        assert response.status == 200 and response.content_type == "text/event-stream"
        assert (await response.read()).decode() == (
            'data: {"token": "Hé", "gpu": 0}\n\ndata: {"token": " 🙂\\n", "gpu": 0}\n\ndata: {"done": true}\n\n'
        )


async def test_tool_calls_are_events_of_their_own():
    async with client(FakeScheduler(ToolCall("1+2", "3"), ToolCall("1/0", None))) as session:
        text = await (await session.post("/chat/completions", json=HELLO)).text()
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line]
    assert [event.get("tool") for event in events] == [
        {"expression": "1+2", "output": "3"},
        {"expression": "1/0", "output": None},
        None,
    ]


async def test_sampling_comes_from_the_request_or_else_from_the_server():
    scheduler = FakeScheduler()
    async with client(
        scheduler, defaults=Sampling(temperature=0.5, top_k=7, max_tokens=9)
    ) as session:
        own = {"temperature": 0, "top_k": 0, "max_tokens": 4096}
        for extra in ({}, own, {"temperature": None, "unknown": None}):
            assert (await session.post("/chat/completions", json=HELLO | extra)).status == 200
    asked = [
        (request.temperature, request.top_k, request.max_tokens) for request in scheduler.requests
    ]
    assert asked == [(0.5, 7, 9), (0, 0, 4096), (0.5, 7, 9)]
    assert len({request.seed for request in scheduler.requests}) == 3


def messages(*contents, role="user"):
    return {"messages": [{"role": role, "content": content} for content in contents]}


BAD = [
    (400, messages()),
    (400, messages(*["x"] * 501)),
    (400, messages("")),
    (400, messages("x", [], role="assistant")),
    (400, messages("x" * 8001)),
    (400, messages(*["x" * 8000] * 4, "x")),
    (400, messages("x" * 32001, role="assistant")),
    (400, messages([{"type": "text", "text": "x" * 16001}] * 2, role="assistant")),
    (400, messages("x", role="system")),
    (400, HELLO | {"temperature": 2.01}),
    (400, HELLO | {"temperature": -0.1}),
    (400, HELLO | {"temperature": float("nan")}),
    (400, HELLO | {"top_k": -1}),
    (400, HELLO | {"top_k": 201}),
    (400, HELLO | {"max_tokens": 0}),
    (400, HELLO | {"max_tokens": 4097}),
    (422, []),
    (422, {}),
    (422, {"messages": "x"}),
    (422, {"messages": ["x"]}),
    (422, messages(None)),
    (422, messages(["x"])),
    (422, messages([{"type": "text", "text": "x"}])),  # parts are for the assistant
    (400, messages([{"type": "special", "text": "x"}], role="assistant")),
    (422, messages([{"type": [], "text": "x"}], role="assistant")),
    (422, messages([{"type": "text"}], role="assistant")),
    (422, {"messages": [{"content": "x"}]}),
    (422, HELLO | {"temperature": "1"}),
    (422, HELLO | {"top_k": 1.5}),
    (422, HELLO | {"max_tokens": True}),
]


async def test_what_is_over_a_limit_is_400_and_what_has_the_wrong_type_422():
    scheduler = FakeScheduler()
    async with client(scheduler) as session:
        for status, body in BAD:
            response = await session.post("/chat/completions", json=body)
            answer = await response.json()
            assert (response.status, list(answer)) == (status, ["detail"]), (body, answer)
            assert isinstance(answer["detail"], str) and len(answer["detail"]) < 200
    assert not scheduler.requests


async def test_the_limits_themselves_are_allowed():
    async with client(FakeScheduler(), max_len=10**6) as session:
        for body in (
            messages(*["x"] * 500),
            messages(*["x" * 8000] * 4),
            # a reply may be longer than what a user writes
            messages("x" * 32000, role="assistant"),
            messages([{"type": "text", "text": "x" * 16000}] * 2, role="assistant"),
            HELLO | {"temperature": 2, "top_k": 200, "max_tokens": 1},
        ):
            assert (await session.post("/chat/completions", json=body)).status == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"messages": ' + b"1" * 5000 + b"}"]
)
async def test_a_body_that_is_not_json_is_422(body):
    async with client(FakeScheduler()) as session:
        response = await session.post(
            "/chat/completions", data=body, headers={"Content-Type": "application/json"}
        )
        assert response.status == 422 and "detail" in await response.json()


async def test_a_huge_body_and_a_wrong_path_or_method_are_answered_in_json():
    async with client(FakeScheduler()) as session:
        for status, response in (
            (413, await session.post("/chat/completions", json=messages("x" * 2**20))),
            (404, await session.get("/secret")),
            (404, await session.get("/../server.py")),
            (405, await session.get("/chat/completions")),
        ):
            assert response.status == status and "detail" in await response.json()


CONVERSATION = [
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


async def test_prompt_equals_the_rendering_that_the_model_was_trained_on():
    scheduler = FakeScheduler()
    async with client(scheduler) as session:
        await session.post("/chat/completions", json={"messages": CONVERSATION})
    answered = [*CONVERSATION, {"role": "assistant", "content": ""}]
    expected = chat.render_for_completion(TOKENIZER, {"messages": answered})
    assert list(scheduler.requests[0].tokens) == expected


async def test_text_never_becomes_a_control_token():
    scheduler = FakeScheduler()
    text = "".join(SPECIAL_TOKENS)
    async with client(scheduler) as session:
        body = {
            "messages": [{"role": role, "content": text} for role in ("user", "assistant", "user")]
        }
        await session.post("/chat/completions", json=body)
    tokens = scheduler.requests[0].tokens
    names = {id: name for name, id in SPECIAL.items()}
    assert [names[token][2:-2] for token in tokens if token in names] == [
        "bos",
        "user_start",
        "user_end",
        "assistant_start",
        "assistant_end",
        "user_start",
        "user_end",
        "assistant_start",
    ]
    assert TOKENIZER.decode(tokens).count(text) == 3


async def test_a_conversation_beyond_the_context_loses_its_first_turns():
    scheduler = FakeScheduler()
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": f"{i:02d}" + "x" * 48} for i in range(11)
    ]
    async with client(scheduler, max_len=256) as session:
        response = await session.post(
            "/chat/completions", json={"messages": turns, "max_tokens": 40}
        )
        fits = await session.post(
            "/chat/completions", json={"messages": turns[:3], "max_tokens": 40}
        )
    assert (
        response.headers["X-Dropped-Messages"] == "8" and "X-Dropped-Messages" not in fits.headers
    )
    # bos, assistant_start and 3 turns of 52 leave room for 40 and for one turn, but it would be
    # the assistant's.
    assert len(scheduler.requests[0].tokens) == 2 + 3 * 52
    text = TOKENIZER.decode(scheduler.requests[0].tokens)
    assert text.startswith("<|bos|><|user_start|>08") and "<|user_start|>10" in text


@pytest.mark.parametrize("chars,fits", [(200, True), (251, True), (252, False), (400, False)])
def test_the_last_message_is_never_cut(chars, fits):
    conversation = [
        {"role": role, "content": "x" * n} for role, n in (("user", 9), ("user", chars))
    ]
    if fits:
        tokens, dropped = make_prompt(TOKENIZER, conversation, max_len=256, max_tokens=512)
        assert dropped == 1 and len(tokens) == chars + 4 <= 255
    else:
        with pytest.raises(BadRequest, match="the model's context is 256") as error:
            make_prompt(TOKENIZER, conversation, max_len=256, max_tokens=512)
        assert error.value.status == 400


async def test_a_client_that_goes_away_ends_its_generation():
    scheduler = FakeScheduler("Hello", asyncio.Event())
    async with client(scheduler) as session:
        response = await session.post("/chat/completions", json=HELLO)
        await response.content.readuntil(b"\n\n")
        response.close()
        await eventually(lambda: scheduler.handles[0].cancelled.is_set())


async def test_a_client_that_leaves_the_queue_is_taken_out_of_it():
    scheduler = FakeScheduler(asyncio.Event())  # not a word so far
    async with client(scheduler) as session:
        response = await session.post("/chat/completions", json=HELLO)
        response.close()
        await eventually(lambda: scheduler.handles[0].cancelled.is_set())


async def test_a_full_queue_is_503():
    async with client(FakeScheduler(error=QueueFull("64 requests wait already"))) as session:
        response = await session.post("/chat/completions", json=HELLO)
        assert response.status == 503 and "Retry-After" in response.headers
        assert (await response.json())["detail"].startswith("64 requests wait already")
        assert (await (await session.get("/health")).json())["ready"] is True


async def test_a_failed_engine_is_503_and_no_longer_ready():
    async with client(FakeScheduler(error=RuntimeError("the engine has failed"))) as session:
        response = await session.post("/chat/completions", json=HELLO)
        assert (
            response.status == 503 and "the engine has failed" in (await response.json())["detail"]
        )
        health = await (await session.get("/health")).json()
        assert health["ready"] is False and health["status"] == "failed"


async def test_a_generation_that_fails_says_so_and_never_claims_to_be_done(caplog):
    async with client(FakeScheduler("Hel", RuntimeError("secret detail"))) as session:
        text = await (await session.post("/chat/completions", json=HELLO)).text()
        assert (await session.get("/health")).status == 200
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line]
    assert events[0]["token"] == "Hel" and list(events[1]) == ["error"] and len(events) == 2
    assert "secret detail" not in text and "secret detail" in caplog.text


async def test_health_and_stats_count_slots():
    async with client(FakeScheduler(), num_slots=5, devices=("cuda:0", "cuda:1")) as session:
        health = await (await session.get("/health")).json()
        assert health["status"] == "ok" and health["ready"] is True and health["num_gpus"] == 2
        assert health["available_workers"] == 3 and health["model"] == {"name": "test"}
        assert await (await session.get("/stats")).json() == {
            "total_workers": 5,
            "available_workers": 3,
            "busy_workers": 2,
            "queued_requests": 1,
            "workers": [{"gpu_id": 0, "device": "cuda:0"}, {"gpu_id": 1, "device": "cuda:1"}],
        }


async def test_the_page_loads_nothing_from_elsewhere():
    async with client(FakeScheduler()) as session:
        page = await session.get("/")
        html = await page.text()
        assert page.content_type == "text/html" and "<title>NanoChat</title>" in html
        policy = page.headers["Content-Security-Policy"]
        assert (
            policy.startswith("default-src 'none';")
            and "unsafe" not in policy
            and "http" not in policy
        )
        wanted = set(re.findall(r'(?:src|href)="([^"]*)"', html))
        assert {"/chat.js", "/chat.css", "/logo.svg"} <= wanted
        script = await (await session.get("/chat.js")).text()
        wanted |= {f"/{name}" for name in re.findall(r'from "\./([^"]*)"', script)}
        for path in wanted:
            response = await session.get(path)
            assert response.status == 200, path
            # a name, never fetched
            text = (await response.text()).replace("http://www.w3.org/2000/svg", "")
            assert not re.search(
                r"https?://|//\w+\.\w|@import|innerHTML|\beval\b|document\.write", text
            ), path
        assert " style=" not in html and not re.search(r"\son\w+=|<script>|<style", html)
        assert (await session.get("/logo.svg")).content_type == "image/svg+xml"


def test_an_address_that_is_not_to_be_had_is_the_users_to_know():
    with server.bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(
            UsageError, match=f"--port {port}, choose others: Address already in use"
        ):
            server.bind("127.0.0.1", port)
    with pytest.raises(UsageError, match="--host 192.0.2.1 .* assign requested address"):
        server.bind("192.0.2.1", 0)  # reserved for documentation, RFC 5737


STOPPABLE = """
import asyncio, sys
sys.path.insert(0, "tests/serve")
from test_server import FakeScheduler, Sampling, TOKENIZER, server
class Ends(asyncio.Event):
    async def wait(self):  # while the server is told to stop
        await asyncio.sleep(0.3)
hangs = asyncio.Event()
scheduler = FakeScheduler("Hello", hangs if sys.argv[1] == "hangs" else Ends(), " you")
app = server.create_app(scheduler, TOKENIZER, {}, max_len=99, num_slots=1, defaults=Sampling(), grace=0.5)
sock = server.bind("127.0.0.1", 0)
server.run(app, sock, lambda: print(sock.getsockname()[1], flush=True))
print("clean")
"""


@pytest.mark.parametrize(
    "reply,rest",
    [
        ("ends", b'data: {"token": " you", "gpu": 0}\n\ndata: {"done": true}\n\n'),
        ("hangs", b'data: {"error": "the server is shutting down"}\n\n'),
    ],
)
async def test_a_signal_lets_replies_end_within_the_grace_and_then_breaks_them_off(reply, rest):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        STOPPABLE,
        reply,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        port = int(await process.stdout.readline())
        async with aiohttp.ClientSession() as session:
            response = await session.post(f"http://127.0.0.1:{port}/chat/completions", json=HELLO)
            await response.content.readuntil(b"\n\n")
            process.send_signal(signal.SIGTERM)
            assert await response.content.read() == rest
            with pytest.raises(aiohttp.ClientConnectionError):  # no new clients meanwhile
                await session.post(f"http://127.0.0.1:{port}/chat/completions", json=HELLO)
        async with asyncio.timeout(10):
            assert await process.stdout.read() == b"clean\n"
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()


def test_serving_where_the_port_is_taken_or_no_model_is_trained_fails_in_one_line(tmp_path):
    def start(port):
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.serve", "-p", str(port)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path)},
        )

    with server.bind("127.0.0.1", 0) as sock:
        for process, message in (
            (start(sock.getsockname()[1]), "Address already in use"),
            (start(0), "no sft checkpoint"),
        ):
            out, error = process.communicate(timeout=120)
            assert process.returncode == 2 and out == ""
            assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    "flags",
    [
        "--temperature 3",
        "--top-k 201",
        "--max-tokens 0",
        "--max-tokens 99999",
        "-p 65536",
        "--slots 0",
        "-i x",
        "--max-queue 0",
        "--timeout 0",
        "--grace -1",
        "-n 0",
        "--device-type x",
        "--api-key= ",
        "--cors-origin example.com",
        "--cors-origin https://example.com/path",
    ],
)
def test_flags_are_checked_before_anything_is_loaded(flags):
    with pytest.raises(UsageError, match=re.split("[ =]", flags)[1] or "expected a value"):
        parse(serve.Config, flags.split(), prog="serve", description="")


def test_the_greeting_says_who_can_reach_the_server(monkeypatch):
    def greeting(sock, **flags):
        return serve.greeting(serve.Config(**flags), sock, "nanochat-d4-sft")

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
    with pytest.raises(UsageError, match="not together"):
        mesh("-n 4 --mesh 2x2")


async def test_real_engine_gives_every_client_its_own_reply_and_survives_those_who_leave():
    config = GPTConfig.modern(
        1, aspect_ratio=32, head_dim=32, sequence_len=64, vocab_size=TOKENIZER.vocab_size
    )
    engine = Engine(
        config, init_params(config, jax.random.key(0)), TOKENIZER, num_slots=2, max_prefill_rows=1
    )
    asked = [
        {
            "messages": [{"role": "user", "content": f"{n} times two?"}],
            "temperature": 0,
            "max_tokens": 20 + n,
        }
        for n in range(5)
    ]

    def expected(body):
        tokens, _ = make_prompt(
            TOKENIZER, body["messages"], max_len=64, max_tokens=body["max_tokens"]
        )
        return engine.generate([Request(tokens, max_tokens=body["max_tokens"], temperature=0)])[
            0
        ].text

    with Scheduler(engine) as scheduler:
        async with client(scheduler, max_len=64) as session:

            async def ask(body):
                response = await session.post("/chat/completions", json=body)
                events = [
                    json.loads(line[6:]) for line in (await response.text()).split("\n\n") if line
                ]
                assert events.pop() == {"done": True}
                return "".join(event["token"] for event in events)

            leaver = await session.post("/chat/completions", json=asked[0] | {"max_tokens": 4096})
            leaver.close()
            replies = await asyncio.gather(*map(ask, asked))
            await eventually(lambda: scheduler.num_active == 0)
    assert replies == [expected(body) for body in asked]
    assert len(set(replies)) > 1


async def test_a_reply_over_its_deadline_is_broken_off_and_frees_its_slot():
    scheduler = FakeScheduler("Hel", asyncio.Event())
    async with client(scheduler, deadline=0.2) as session:
        text = await (await session.post("/chat/completions", json=HELLO)).text()
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line]
    assert events == [
        {"token": "Hel", "gpu": 0},
        {"error": "the reply took longer than 0.2 seconds"},
    ]
    assert scheduler.handles[0].cancelled.is_set()


async def test_metrics_count_what_was_asked_and_given():
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
        'nanochat_http_requests_total{route="/chat/completions",status="200"}': 1,
        'nanochat_http_requests_total{route="/chat/completions",status="422"}': 1,
        'nanochat_http_requests_total{route="/v1/chat/completions",status="200"}': 1,
        'nanochat_http_requests_total{route="unknown",status="404"}': 1,
        'nanochat_replies_total{reason="stop"}': 3,
        "nanochat_prompt_tokens_total": 9,
        "nanochat_generated_tokens_total": 6,
        "nanochat_time_to_first_token_seconds_count": 3,
        "nanochat_inter_token_seconds_count": 3,
        "nanochat_reply_seconds_count": 3,
        "nanochat_slots": 2,
        "nanochat_active_requests": 2,
        "nanochat_waiting_requests": 1,
    }
    assert {name: float(numbers[name]) for name in expected} == expected

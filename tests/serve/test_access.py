"""Checks before every handler: host names, keys, origins, sizes, and slow or hostile clients."""

import asyncio
import gzip
import json
import logging
import socket
from contextlib import asynccontextmanager

import pytest
from fakes import HELLO, FakeScheduler, client, eventually

from nanochat_jax.serve import access, server
from nanochat_jax.serve.settings import ServerConfig


@asynccontextmanager
async def connection(session):
    """A bare (reader, writer) to the server of a session."""
    reader, writer = await asyncio.open_connection("127.0.0.1", session._base_url.port)
    try:
        async with asyncio.timeout(5):
            yield reader, writer
    finally:
        writer.close()


HEAD = b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
ACCEPTED = """127.0.0.1:8000 [::1]:8000 192.168.1.7 localhost:8000 LocalHost. chat.localhost
    mine.example:8000""".split()
REFUSED = """evil.example localhost.evil.example 127.0.0.1.evil.example:8000 notlocalhost
    evil.example:80:8000 [::1].evil""".split()


async def test_a_page_that_calls_us_by_a_name_of_its_own_is_refused():
    """DNS rebinding: a foreign name with this machine's address."""
    scheduler = FakeScheduler("Hi")
    async with client(scheduler, hosts=("Mine.example",)) as session:
        for host in (*ACCEPTED, *REFUSED, ""):
            page = await session.get("/", headers={"Host": host})
            answer = await session.post("/chat/completions", json=HELLO, headers={"Host": host})
            assert page.status == answer.status == (200 if host in ACCEPTED else 403), host
        assert len(scheduler.requests) == len(ACCEPTED)
        refused = await (await session.get("/", headers={"Host": "evil.example"})).json()
        assert "--allowed-hosts" in refused["detail"]
    async with client(FakeScheduler()) as session:
        assert (await session.get("/health", headers={"Host": "any.example"})).status == 200


def test_only_a_server_of_this_machine_alone_checks_its_name_unless_told_to():
    def hosts(address, **flags):
        with server.bind(address, 0) as sock:
            return ServerConfig(host=address, **flags).hosts(sock)

    assert hosts("127.0.0.1") == ("127.0.0.1",) and hosts("0.0.0.0") == ("*",)
    assert hosts("0.0.0.0", allowed_hosts="a.example,b.example") == (
        "0.0.0.0",
        "a.example",
        "b.example",
    )
    assert "*" in hosts("127.0.0.1", allowed_hosts="*")


@pytest.mark.parametrize(
    "head",
    [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"],
)
async def test_a_connection_that_sends_no_whole_request_is_closed(monkeypatch, head):
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.4)
    async with client(FakeScheduler()) as session, connection(session) as (reader, writer):
        writer.write(head)

        async def drip():
            while b"Slow" in head:
                writer.write(b"x")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        answer = await reader.read()  # until the server closes
        dripping.cancel()
        assert answer.startswith(b"HTTP/1.1 200") if b"health" in head else answer == b""


@pytest.mark.skipif(
    not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone has TCP_USER_TIMEOUT"
)
async def test_a_client_that_asks_for_files_and_reads_nothing_is_cut_off(monkeypatch):
    monkeypatch.setattr(server, "UNREAD_SECONDS", 1)
    async with client(FakeScheduler()) as session:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", session._base_url.port))
            sock.sendall(b"GET /chat.js HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
            await eventually(lambda: session.runner.server.connections)
            await eventually(lambda: not session.runner.server.connections, seconds=10)


async def test_a_form_of_another_site_cannot_ask():
    """A browser sends these types across origins without asking first; JSON it does not."""
    scheduler = FakeScheduler()
    async with client(scheduler) as session:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            data = json.dumps(HELLO)
            response = await session.post(
                "/chat/completions", data=data, headers={"Content-Type": kind}
            )
            assert response.status == 422
            assert "Access-Control-Allow-Origin" not in response.headers
    assert not scheduler.requests


async def test_a_client_that_does_not_read_is_given_up_within_a_second():
    # more than the buffers of both sides hold
    scheduler = FakeScheduler(*["x" * 500] * 1000, asyncio.Event())
    async with client(scheduler) as session:
        port = session._base_url.port
        body = json.dumps(HELLO).encode()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", port))
            head = b"POST /chat/completions" + HEAD + str(len(body)).encode() + b"\r\n\r\n"
            await loop.sock_sendall(sock, head + body)
            began = loop.time()
            await eventually(lambda: scheduler.handles and scheduler.handles[0].cancelled.is_set())
            assert loop.time() - began < 1.5  # half a second for a busy machine
        assert (
            b'replies_total{reason="disconnected"} 1.0'
            in await (await session.get("/metrics")).read()
        )


async def test_a_body_too_large_is_refused_before_it_is_sent_and_a_late_one_is_408(monkeypatch):
    monkeypatch.setattr(access, "BODY_SECONDS", 0.1)
    for request, status in (
        (b"POST /chat/completions" + HEAD + b"1048577\r\n\r\n", b" 413 "),
        (b"POST /v1/chat/completions" + HEAD + b"100\r\n\r\n{", b" 408 "),
    ):
        async with client(FakeScheduler()) as session, connection(session) as (reader, writer):
            writer.write(request)
            assert status in await reader.readline()


CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
MALFORMED = {
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(range(200)),
    "random bytes": bytes(range(256)) * 2,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "long header": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20000 + b"\r\n\r\n",
    "long path": b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "header without a name": b"GET / HTTP/1.1\r\nHost: x\r\nnone\r\n\r\n",
    "port": b"GET http://a:99999999/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "chunk": CHAT + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nxx\r\n",
    "two lengths": CHAT + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "negative length": CHAT + b"Content-Length: -2\r\n\r\n{}",
    "not gzip": CHAT.replace(b"/v1", b"/404")
    + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_what_is_not_http_is_one_line_in_the_log(name, caplog):
    caplog.set_level(logging.INFO)
    async with client(FakeScheduler()) as session, connection(session) as (reader, writer):
        writer.write(MALFORMED[name])
        line = await reader.readline()
        assert b" 404 " in line if name == "not gzip" else b" 400 " in line
        await eventually(lambda: "malformed" in caplog.text)
        assert (await session.get("/health")).status == 200
    lines = [record for record in caplog.records if record.name.startswith("aiohttp")]
    assert len(lines) == 1 and lines[0].exc_info is None and lines[0].levelno == logging.INFO
    assert lines[0].getMessage().isprintable() and len(lines[0].getMessage()) < 300
    assert not [record for record in caplog.records if record.exc_info]


BODY = json.dumps(HELLO).encode()
DEEP = b"[" * 100_000
UNREADABLE = {
    "UTF-16": (BODY.decode().encode("utf-16"), ""),
    "UTF-16 without a mark": (BODY.decode().encode("utf-16-le"), ""),
    "UTF-32": (BODY.decode().encode("utf-32"), ""),
    "Latin-1": (BODY.replace(b"Hello", b"caf\xe9"), ""),
    "not gzip": (BODY, "gzip"),
    "not deflate": (BODY, "deflate"),
    "half of it": (gzip.compress(BODY)[:-12], "gzip"),
    "gzip undeclared": (gzip.compress(BODY), ""),
    "unknown": (BODY, "x-foo"),
    "unknown gzip": (gzip.compress(BODY), "x-foo"),
    "NaN": (BODY[:-1] + b', "user": NaN}', ""),
    "infinity": (BODY[:-1] + b', "metadata": {"a": -Infinity}}', ""),
    "over a float": (BODY[:-1] + b', "temperature": 1e999}', ""),
    "deep": (DEEP, ""),
    "empty": (b"", ""),
    "deep, ignored": (BODY[:-1] + b', "metadata": ' + DEEP + b"}", ""),
    "digits": (BODY[:-1] + b', "n": ' + b"1" * 9999 + b"}", ""),
    "surrogate": (BODY[:-1] + b', "\\ud800": 1}', ""),
}


async def test_a_body_that_cannot_be_read_is_the_clients_error(caplog):
    scheduler = FakeScheduler("Hi")
    async with client(scheduler) as session:
        for name, (body, encoding) in UNREADABLE.items():
            headers = {"Content-Type": "application/json"}
            if encoding:
                headers["Content-Encoding"] = encoding
            response = await session.post("/v1/chat/completions", data=body, headers=headers)
            assert response.status == 400, name
            assert (await response.json())["error"]["type"] == "invalid_request_error"
            page = await session.post("/chat/completions", data=body, headers=headers)
            assert page.status in (400, 422), name
    assert not scheduler.requests and "Traceback" not in caplog.text


async def test_a_body_may_be_compressed_or_begin_with_a_byte_order_mark():
    async with client(FakeScheduler("Hi")) as session:
        for body, encoding in (
            (gzip.compress(BODY), "gzip"),
            (BODY, "identity"),
            (b"\xef\xbb\xbf" + BODY, "identity"),
        ):
            headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
            assert (
                await session.post("/v1/chat/completions", data=body, headers=headers)
            ).status == 200


async def test_with_a_key_only_those_who_know_it_may_ask():
    scheduler = FakeScheduler("Hi")
    async with client(scheduler, api_key="secret") as session:
        wrong = ("Bearer", "Bearer secre", "Bearer secrets", "Basic secret", "Bearer \u00e9")
        for headers in ({}, *({"Authorization": value} for value in wrong)):
            for path in ("/chat/completions", "/v1/chat/completions"):
                response = await session.post(path, json=HELLO, headers=headers)
                assert response.status == 401, headers
                assert response.headers["WWW-Authenticate"] == "Bearer"
            for path in ("/stats", "/metrics", "/v1/models"):
                assert (await session.get(path, headers=headers)).status == 401
        for path in ("/", "/chat.js", "/health", "/openapi.json"):
            assert (await session.get(path)).status == 200
        assert (await (await session.get("/health")).json())["api_key"] is True
        assert not scheduler.requests
        for scheme in ("Bearer", "bearer"):
            headers = {"Authorization": f"{scheme} secret"}
            response = await session.post("/chat/completions", json=HELLO, headers=headers)
            assert response.status == 200


async def test_only_pages_of_the_origins_named_may_read_the_answers():
    async def ask(session, origin):
        asked = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        preflight = await session.options("/chat/completions", headers=asked)
        answer = await session.post("/chat/completions", json=HELLO, headers={"Origin": origin})
        allowed = answer.headers.get("Access-Control-Allow-Origin")
        assert preflight.headers.get("Access-Control-Allow-Origin") == allowed
        assert (preflight.headers.get("Access-Control-Allow-Headers") is None) == (allowed is None)
        return allowed

    mine, other = "https://mine.example", "https://other.example"
    async with client(FakeScheduler()) as session:
        assert await ask(session, mine) is None
    async with client(FakeScheduler(), cors_origin=mine) as session:
        assert (await ask(session, mine), await ask(session, other)) == (mine, None)
    async with client(FakeScheduler(), cors_origin="*") as session:
        assert await ask(session, other) == other


def test_a_failure_of_the_servers_own_keeps_its_traceback(caplog):
    async def run():
        async with client(FakeScheduler()):
            try:
                raise RuntimeError("a bug")
            except RuntimeError:
                logging.getLogger("aiohttp.server").exception("Unhandled exception")

    asyncio.run(run())
    assert "Traceback" in caplog.text and "a bug" in caplog.text

"""The chat server: a page and two APIs over a scheduler.

    GET  /                          the page, and the files of web/ that it loads POST
    /chat/completions          a reply as server-sent events; chat_request.py says what may be
    asked POST /v1/chat/completions       OpenAI's API: openai_api.py; GET /v1/models; both also
    without /v1 GET  /health, /stats, /metrics  whether it is up, how many of its slots are busy,
    Prometheus' numbers GET  /openapi.json              a description of all this

A body of /chat/completions is upstream's. If it has other fields, such as `model`, it is OpenAI's.

A reply of /chat/completions is a stream of `data: <json>` events: {"token": text, "gpu": 0} for
text, {"tool": {"expression": text, "output": text or null}, "gpu": 0} for a calculation, at last
{"done": true}; or {"error": text} if it breaks off. A conversation that outgrows the context loses
its first messages; the header X-Dropped-Messages says how many. A client that goes away, or does
not read, ends its generation. Mistakes are answered with {"detail": text}: 400 for what is over a
limit, 401 without the key, 403 for a name that is not the server's, 422 for what has the wrong
type, 503 with Retry-After when the queue is full.
"""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from nanochat_jax.devices import release_memory
from nanochat_jax.errors import UsageError
from nanochat_jax.infer.request import Request, Result, ToolCall
from nanochat_jax.infer.scheduler import Scheduler
from nanochat_jax.serve import access, metrics
from nanochat_jax.serve.access import read_json
from nanochat_jax.serve.chat_request import ChatRequest, Sampling, check, for_page, make_prompt
from nanochat_jax.serve.openai_api import OpenAIServer
from nanochat_jax.serve.openapi import describe
from nanochat_jax.serve.replies import EventStream, Replies, ReplyError
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

WEB = Path(__file__).parent / "web"
CONTENT_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
# of the kernel, for each client: more would hide for long that it does not read
SEND_BUFFER_BYTES = 32 * 1024
IDLE_SECONDS = 75.0  # of a connection, until the whole head of its first or next request has come
# in which a client reads nothing of what was sent, until it is cut off (Linux only)
UNREAD_SECONDS = 30
RELEASE_SECONDS = 30.0  # from one giving back of memory to the next
SHUTDOWN_SECONDS = 2.0  # for handlers to return once their replies have ended


def create_app(
    scheduler: Scheduler,
    tokenizer: Tokenizer,
    model_info: Mapping[str, Any],
    *,
    max_len: int,
    num_slots: int,
    devices: tuple[str, ...] = ("cpu",),
    defaults: Sampling,
    model_id: str = "nanochat",
    hosts: tuple[str, ...] = ("*",),
    api_key: str | None = None,
    cors_origins: tuple[str, ...] = (),
    deadline: float = 600.0,
    grace: float = 10.0,
) -> web.Application:
    """The application. The scheduler must be running, and remains the caller's to close.

    Args:
      model_info: shown by /health; its "name" stands in the page's header.
      max_len: the longest sequence of the scheduler's engine; prompts are cut to it.
      num_slots: sequences in flight at once, for /health and /stats.
      devices: names of the devices the model is on.
      defaults: how to sample where a request does not say.
      model_id: the model's name for OpenAI's clients.
      hosts: names that clients may call the server by, besides its addresses and localhost; "*" is
        any.
      api_key: what clients must know; None lets everyone in.
      cors_origins: origins whose pages may call; "*" is all.
      deadline: seconds that a reply may take, its time in the queue included.
      grace: seconds that replies in flight are given when the server is told to stop.
    """
    counts = metrics.Metrics(scheduler, num_slots)
    replies = Replies(scheduler, counts, deadline=deadline)
    keyed = api_key is not None
    openai = OpenAIServer(
        replies=replies, tokenizer=tokenizer, model=model_id, max_len=max_len, defaults=defaults
    )
    server = _ChatServer(
        scheduler=scheduler,
        replies=replies,
        tokenizer=tokenizer,
        model_info=model_info,
        max_len=max_len,
        num_slots=num_slots,
        devices=devices,
        defaults=defaults,
        keyed=keyed,
        openai=openai,
    )
    description = describe(model_id, keyed=keyed)

    async def show_metrics(request: web.Request) -> web.Response:
        return web.Response(body=counts.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def show_description(request: web.Request) -> web.Response:
        return web.json_response(description)

    app = web.Application(
        client_max_size=access.MAX_BODY_BYTES,
        middlewares=access.middlewares(
            counts, hosts=hosts, api_key=api_key, cors=bool(cors_origins)
        ),
    )
    for path in WEB.rglob("*"):
        if path.suffix in CONTENT_TYPES:
            name = path.relative_to(WEB).as_posix()
            app.router.add_get("/" if name == "index.html" else f"/{name}", _page_file(path))
    for prefix, chat in ("", server.chat_completions), ("/v1", openai.chat_completions):
        for slash in "", "/":
            app.router.add_post(f"{prefix}/chat/completions{slash}", chat)
            app.router.add_get(f"{prefix}/models{slash}", openai.list_models)
            app.router.add_get(f"{prefix}/models/{{model:.*[^/]}}{slash}", openai.show_model)
    app.router.add_get("/health", server.health)
    app.router.add_get("/stats", server.stats)
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/openapi.json", show_description)
    app.on_response_prepare.append(access.add_headers(cors_origins))
    aiohttp_log = logging.getLogger("aiohttp.server")
    aiohttp_log.setLevel(logging.DEBUG)  # at which aiohttp logs a malformed first line
    aiohttp_log.addFilter(access.malformed_on_one_line)

    async def shut_down(app: web.Application) -> None:
        log.info(
            "shutting down: replies in flight are finished first, unless the signal comes again"
        )
        await replies.shut_down(grace)

    app.on_shutdown.append(shut_down)
    return app


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises `UsageError` if the address is not to
    be had.

    Made before the model is loaded, so that a taken port is known at once; early clients wait.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        sock = socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=both)
    except OSError as error:  # in use, not for this user, not of this machine, or no address
        reason = (
            error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        )
        raise UsageError(
            f"cannot listen on --host {host} --port {port}, choose others: {reason}"
        ) from error
    # connections inherit these
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    return sock


def runner_options() -> dict[str, Any]:
    """For aiohttp's runner: a client that leaves cancels its handler, an idle one is cut off."""
    return {
        "handler_cancellation": True,
        "shutdown_timeout": SHUTDOWN_SECONDS,
        "access_log": None,
        "keepalive_timeout": IDLE_SECONDS,
    }


def run(app: web.Application, sock: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; then let the replies in flight end, and return. A second one
    kills.
    """
    app.cleanup_ctx.append(_releasing)
    web.run_app(app, sock=sock, print=lambda _: on_ready(), **runner_options())


async def _releasing(app: web.Application) -> AsyncIterator[None]:
    async def release() -> None:
        while True:
            await asyncio.to_thread(release_memory)
            await asyncio.sleep(RELEASE_SECONDS)

    task = asyncio.create_task(release())
    yield
    task.cancel()


@dataclass(frozen=True, kw_only=True)
class _ChatServer:
    scheduler: Scheduler
    replies: Replies
    tokenizer: Tokenizer
    model_info: Mapping[str, Any]
    max_len: int
    num_slots: int
    devices: tuple[str, ...]
    defaults: Sampling
    keyed: bool
    openai: OpenAIServer

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        if access.for_openai(request) or not for_page(body):
            return await self.openai.reply(request, body)
        chat = check(ChatRequest, body)
        sampling = chat.sampling(self.defaults)
        messages = chat.model_dump()["messages"]
        tokens, dropped = make_prompt(
            self.tokenizer, messages, max_len=self.max_len, max_tokens=sampling.max_tokens
        )
        wanted = Request(tokens, **sampling.model_dump(), seed=secrets.randbelow(2**31))
        headers = {"X-Dropped-Messages": str(dropped)} if dropped else {}
        async with self.replies.open([wanted]) as events, EventStream(request, headers) as stream:
            try:
                async for batch in events:
                    for _, event in batch:
                        if isinstance(event, Result):
                            _log_words(messages, event)
                    await stream.send(*(_event(event) for _, event in batch))
            except ReplyError as error:
                await stream.send({"error": error.detail})
        return stream.response

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "status": "failed" if self.replies.failed else "ok",
                "ready": self.replies.ready,
                "num_gpus": len(self.devices),
                "available_workers": self.num_slots - self.scheduler.num_active,
                "model": self.model_info,
                "defaults": self.defaults.model_dump(),
                "api_key": self.keyed,
            }
        )

    async def stats(self, request: web.Request) -> web.Response:
        """A worker is a slot of the batch; all of them share the devices."""
        busy = self.scheduler.num_active
        return web.json_response(
            {
                "total_workers": self.num_slots,
                "available_workers": self.num_slots - busy,
                "busy_workers": busy,
                "queued_requests": self.scheduler.num_waiting,
                "workers": [
                    {"gpu_id": index, "device": device} for index, device in enumerate(self.devices)
                ],
            }
        )


def _event(event: str | ToolCall | Result) -> dict[str, Any]:
    if isinstance(event, Result):
        return {"done": True}
    if isinstance(event, ToolCall):
        return {"tool": {"expression": event.expression, "output": event.output}, "gpu": 0}
    return {"token": event, "gpu": 0}


def _page_file(path: Path) -> Callable[[web.Request], Any]:
    content, content_type = path.read_bytes(), CONTENT_TYPES[path.suffix]

    async def handler(request: web.Request) -> web.Response:
        return web.Response(
            body=content,
            content_type=content_type,
            charset="utf-8",
            headers={"Cache-Control": "no-cache"},
        )

    return handler


def _log_words(messages: list[dict[str, Any]], result: Result) -> None:
    for message in messages:
        log.debug("[%s]: %r", message["role"].upper(), message["content"])
    log.debug("[ASSISTANT] (GPU 0): %r", result.text)

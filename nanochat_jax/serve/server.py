"""The chat server: a page and two APIs over a scheduler.

    GET  /                          the page, and the files of web/ that it loads
    POST /chat/completions          a reply as server-sent events (chat_request.py)
    POST /v1/chat/completions       OpenAI's API (openai_api.py); also without /v1
    POST /v1/completions            completions of text (text_completions.py); also without /v1
    GET  /v1/models                 likewise
    GET  /health, /stats, /metrics  status; slots in use; Prometheus metrics
    GET  /openapi.json              a description of the above

/chat/completions takes upstream's body. A body with other fields, such as `model`, is OpenAI's.

The events of /chat/completions are `data: <json>`: {"token": text, "gpu": 0} for text,
{"tool": {"expression": text, "output": text or null}, "gpu": 0} for a calculation, finally
{"done": true}; or {"error": text} if the reply ends early. A conversation that outgrows the context
loses its first messages; the header X-Dropped-Messages has their number. A client that leaves or
does not read ends its generation. Errors are {"detail": text}: 400 for a wrong value, 401 without
the key, 403 for an unknown host name, 422 for a wrong type, 503 with Retry-After if the queue is
full.
"""

import asyncio
import json
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic import BaseModel

from nanochat_jax.checkpoint import Loaded
from nanochat_jax.devices import release_memory
from nanochat_jax.errors import UsageError
from nanochat_jax.infer.request import Result, ToolCall
from nanochat_jax.infer.scheduler import Event, Scheduler
from nanochat_jax.serve import access, metrics
from nanochat_jax.serve.access import read_json
from nanochat_jax.serve.chat_request import ChatRequest, check, for_page, make_prompt
from nanochat_jax.serve.openai_api import OpenAIServer
from nanochat_jax.serve.openapi import Compilation, Health, Stats, Status, Worker, describe
from nanochat_jax.serve.replies import EventStream, Replies, ReplyError
from nanochat_jax.serve.settings import ServerConfig
from nanochat_jax.serve.text_completions import TextCompletions

log = logging.getLogger(__name__)

WEB = Path(__file__).parent / "web"
CONTENT_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
# the kernel's, per client: a larger one hides for long that the client does not read
SEND_BUFFER_BYTES = 32 * 1024
IDLE_SECONDS = 75.0  # for the headers of a connection's first or next request to arrive
UNREAD_SECONDS = 30  # until a client that reads nothing is disconnected (Linux only)
RELEASE_SECONDS = 30.0  # between two releases of memory
SHUTDOWN_SECONDS = 2.0  # for handlers to return once their replies have ended


def model_id(model: Loaded) -> str:
    """The model's name for OpenAI's clients."""
    return f"nanochat-{model.tag}-{model.source}"


def create_app(
    scheduler: Scheduler, model: Loaded, config: ServerConfig, hosts: tuple[str, ...] = ("*",)
) -> web.Application:
    """The application. The scheduler must be running; the caller closes it.

    Args:
        model: its tokenizer, and what /health shows; the parameters are not used.
        hosts: accepted host names, besides addresses and localhost; "*" is any.
    """
    counts = metrics.Metrics(scheduler)
    replies = Replies(scheduler, counts, deadline=config.timeout)
    openai = OpenAIServer(
        replies=replies,
        tokenizer=model.tokenizer,
        model=model_id(model),
        max_len=scheduler.engine.max_len,
        defaults=config.sampling,
    )
    completions = TextCompletions(
        replies=replies,
        engine=scheduler.engine,
        tokenizer=model.tokenizer,
        model=openai.model,
        defaults=config.sampling,
    )
    server = _ChatServer(scheduler, replies, model, config, openai)

    async def show_metrics(request: web.Request) -> web.Response:
        return web.Response(body=counts.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    app = web.Application(
        client_max_size=access.MAX_BODY_BYTES, middlewares=access.middlewares(counts, config, hosts)
    )
    _add_page(app)
    for prefix, chat in ("", server.chat_completions), ("/v1", openai.chat_completions):
        for slash in "", "/":
            app.router.add_post(f"{prefix}/chat/completions{slash}", chat)
            app.router.add_post(f"{prefix}/completions{slash}", completions.complete)
            app.router.add_get(f"{prefix}/models{slash}", openai.list_models)
            app.router.add_get(f"{prefix}/models/{{model:.*[^/]}}{slash}", openai.show_model)
    app.router.add_get("/health", server.health)
    app.router.add_get("/stats", server.stats)
    app.router.add_get("/metrics", show_metrics)
    description = json.dumps(describe(keyed=config.key is not None)).encode()
    app.router.add_get("/openapi.json", _constant(description, "application/json"))
    app.on_response_prepare.append(access.add_headers(config.cors_origins))
    aiohttp_log = logging.getLogger("aiohttp.server")
    aiohttp_log.setLevel(logging.DEBUG)  # the level at which aiohttp logs a malformed first line
    aiohttp_log.addFilter(access.malformed_on_one_line)

    async def shut_down(app: web.Application) -> None:
        log.info("shutting down after the replies in progress; signal again to stop now")
        await replies.shut_down(config.grace)

    app.on_shutdown.append(shut_down)
    return app


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises `UsageError` if it cannot be opened.

    Call it before loading the model, to report a taken port immediately; early clients wait.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        sock = socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=both)
    except OSError as error:
        reason = (
            error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        )
        raise UsageError(
            f"cannot listen on `host={host}` `port={port}`, choose others: {reason}"
        ) from error
    # connections inherit these
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    return sock


def runner_options() -> dict[str, Any]:
    """Options of aiohttp's runner: a client that leaves cancels its handler."""
    return {
        "handler_cancellation": True,
        "shutdown_timeout": SHUTDOWN_SECONDS,
        "access_log": None,
        "keepalive_timeout": IDLE_SECONDS,
    }


def run(app: web.Application, sock: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish the replies in progress."""
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


@dataclass(frozen=True)
class _ChatServer:
    scheduler: Scheduler
    replies: Replies
    model: Loaded
    config: ServerConfig
    openai: OpenAIServer

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        if access.for_openai(request) or not for_page(body):
            return await self.openai.reply(request, body)
        chat = check(ChatRequest, body)
        sampling = chat.sampling(self.config.sampling)
        messages = chat.model_dump()["messages"]
        tokens, dropped = make_prompt(
            self.model.tokenizer,
            messages,
            max_len=self.scheduler.engine.max_len,
            max_tokens=sampling.max_tokens,
        )
        generate = sampling.request(tokens, seed=secrets.randbelow(2**31))
        headers = {"X-Dropped-Messages": str(dropped)} if dropped else {}
        async with self.replies.open([generate]) as events, EventStream(request, headers) as stream:
            try:
                async for batch in events:
                    await stream.send(*(_event(event) for _, event in batch))
                    if isinstance(batch[-1][1], Result):
                        _log_conversation(messages, batch[-1][1])
            except ReplyError as error:
                await stream.send({"error": error.detail})
        return stream.response

    async def health(self, request: web.Request) -> web.Response:
        model, engine, sampling = self.model, self.scheduler.engine, self.config.sampling
        programs = Compilation(compiled=engine.programs.compiled, left=engine.programs.left)
        status: Status = "starting" if programs.left else "ok"
        health = Health(
            status="failed" if self.replies.failed else status,
            ready=self.replies.ready,
            programs=programs,
            num_gpus=len(engine.devices),
            available_workers=engine.num_slots - self.scheduler.num_active,
            model={
                "name": f"{model.source} {model.tag}, step {model.step}",
                "source": model.source,
                "tag": model.tag,
                "step": model.step,
                "context": engine.max_len,
            },
            defaults={name: getattr(sampling, name) for name in ChatRequest.SAMPLING},
            api_key=self.config.key is not None,
        )
        return _json(health)

    async def stats(self, request: web.Request) -> web.Response:
        """Slots in use. A worker is a slot; all of them share the devices."""
        total, busy = self.scheduler.engine.num_slots, self.scheduler.num_active
        stats = Stats(
            total_workers=total,
            available_workers=total - busy,
            busy_workers=busy,
            queued_requests=self.scheduler.num_waiting,
            workers=[
                Worker(gpu_id=index, device=str(device))
                for index, device in enumerate(self.scheduler.engine.devices)
            ],
        )
        return _json(stats)


def _event(event: Event) -> dict[str, Any]:
    if isinstance(event, Result):
        return {"done": True}
    if isinstance(event, ToolCall):
        return {"tool": {"expression": event.expression, "output": event.output}, "gpu": 0}
    return {"token": event, "gpu": 0}


def _json(answer: BaseModel) -> web.Response:
    return web.json_response(answer.model_dump())


def _constant(body: bytes, content_type: str) -> Callable[[web.Request], Any]:
    """A handler that always returns `body`."""
    headers = {"Content-Type": f"{content_type}; charset=utf-8", "Cache-Control": "no-cache"}

    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body, headers=headers)

    return handler


def _add_page(app: web.Application) -> None:
    for path in WEB.rglob("*"):
        if path.suffix in CONTENT_TYPES:
            name = path.relative_to(WEB).as_posix()
            handler = _constant(path.read_bytes(), CONTENT_TYPES[path.suffix])
            app.router.add_get("/" if name == "index.html" else f"/{name}", handler)


def _log_conversation(messages: list[dict[str, Any]], result: Result) -> None:
    for message in messages:
        log.debug("[%s]: %r", message["role"].upper(), message["content"])
    log.debug("[ASSISTANT] (GPU 0): %r", result.text)

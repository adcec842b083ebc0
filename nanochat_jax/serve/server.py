"""The chat server: one page and one streaming endpoint over a scheduler.

    GET  /                    the page, and what it loads: /chat.js and other modules, /chat.css, /logo.svg
    POST /chat/completions    a reply as server-sent events; chat_request.py says what may be asked
    GET  /health, /stats      whether it is up, and how many of its slots are busy

A reply is a stream of `data: <json>` events: {"token": text, "gpu": 0} for text, {"tool": {"expression": text,
"output": text or null}, "gpu": 0} for a calculation, at last {"done": true}; or {"error": text} if it breaks off. A
conversation that outgrows the context loses its first messages; the header X-Dropped-Messages says how many. A client
that goes away ends its generation. Mistakes are answered with {"detail": text}: 400 for what is over a limit, 422 for
what has the wrong type, 503 when the queue is full.
"""

import asyncio
import errno
import json
import logging
import secrets
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web

from nanochat_jax.cli import UsageError
from nanochat_jax.infer.request import Request, Result, ToolCall
from nanochat_jax.infer.scheduler import Handle, QueueFull, Scheduler
from nanochat_jax.serve.chat_request import BadRequest, ChatRequest, Sampling, make_prompt, parse
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

WEB = Path(__file__).parent / "web"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/chat.js": ("chat.js", "text/javascript"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript")
       for name in ("api", "commands", "dom", "highlight", "markdown", "settings", "store", "turns")},
    "/chat.css": ("chat.css", "text/css"),
    "/logo.svg": ("logo.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Server": "nanochat_jax",
}
MAX_BODY_BYTES = 2**20
SHUTDOWN_SECONDS = 5.0  # for replies to end once they are told to


def create_app(
    scheduler: Scheduler,
    tokenizer: Tokenizer,
    model_info: Mapping[str, Any],
    *,
    max_len: int,
    num_slots: int,
    devices: tuple[str, ...] = ("cpu",),
    defaults: Sampling,
) -> web.Application:
    """The application. The scheduler must be running, and remains the caller's to close.

    Args:
      model_info: shown by /health; its "name" stands in the page's header.
      max_len: the longest sequence of the scheduler's engine; prompts are cut to it.
      num_slots: sequences in flight at once, for /health and /stats.
      devices: names of the devices the model is on.
      defaults: how to sample where a request does not say.
    """
    server = _ChatServer(scheduler, tokenizer, model_info, max_len, num_slots, devices, defaults)
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_answer_errors_in_json])
    for route, (name, content_type) in PAGE_FILES.items():
        app.router.add_get(route, _page_file((WEB / name).read_bytes(), content_type))
    app.router.add_post("/chat/completions", server.chat_completions)
    app.router.add_get("/health", server.health)
    app.router.add_get("/stats", server.stats)
    app.on_response_prepare.append(_add_headers)
    app.on_shutdown.append(server.cancel_all)
    return app


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises `UsageError` if the address is not to be had.

    Made before the model is loaded, so that a taken port is known at once; early clients wait.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UsageError(f"--host {host!r} is not an address ({error.strerror}): use 127.0.0.1 or 0.0.0.0") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        sock.close()
        advice = {
            errno.EADDRINUSE: "it is in use: choose another with --port",
            errno.EACCES: "this user may not: choose a --port from 1024 up",
            errno.EADDRNOTAVAIL: "this machine has no such address: use --host 127.0.0.1 or 0.0.0.0",
        }.get(error.errno, error.strerror)
        raise UsageError(f"cannot listen on {host} port {port}, {advice}") from error
    return sock


async def run(app: web.Application, sock: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; then end the replies in flight and return. A second signal ends the process."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_SECONDS, access_log=None)
    await runner.setup()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        await web.SockSite(runner, sock).start()
        for number in signals:
            loop.add_signal_handler(number, stop.set)
        on_ready()
        await stop.wait()
        log.info("shutting down")
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        await runner.cleanup()


class _ChatServer:
    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer, model_info: Mapping[str, Any], max_len: int,
                 num_slots: int, devices: tuple[str, ...], defaults: Sampling) -> None:
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._model_info = dict(model_info)
        self._max_len = max_len
        self._num_slots = num_slots
        self._devices = devices
        self._defaults = defaults
        self._live: set[Handle] = set()
        self._failed = False  # the engine has, as a request found out

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        chat = parse(await _read_json(request), self._defaults)
        sampling = chat.sampling
        tokens, dropped = make_prompt(
            self._tokenizer, chat.messages, max_len=self._max_len, max_tokens=sampling.max_tokens
        )
        handle = self._submit(Request(
            tokens, max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
            seed=secrets.randbelow(2**31),
        ))
        self._live.add(handle)
        start = time.perf_counter()
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8",
                                                   "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
            if dropped:
                response.headers["X-Dropped-Messages"] = str(dropped)
            await response.prepare(request)
            result = await self._stream(handle, response)
            await response.write_eof()
            if result:
                _log_reply(chat, result, time.perf_counter() - start)
        except ConnectionError:
            log.info("the client went away")
        finally:
            self._live.discard(handle)
            handle.cancel()  # nothing happens to one that is done
        return response

    def _submit(self, request: Request) -> Handle:
        try:
            return self._scheduler.submit(request)
        except QueueFull as error:
            raise BadRequest(503, f"{error}: try again in a while") from error
        except RuntimeError as error:  # the engine is gone for good; the scheduler has logged why
            self._failed = True
            raise BadRequest(503, f"{error}: restart the server") from error

    async def _stream(self, handle: Handle, response: web.StreamResponse) -> Result | None:
        """Write the events of a reply; its result, or None if the generation broke off."""
        result = None
        try:
            async for event in handle:
                if isinstance(event, Result):
                    result = event
                elif isinstance(event, ToolCall):
                    tool = {"expression": event.expression, "output": event.output}
                    await response.write(_event({"tool": tool, "gpu": 0}))
                else:
                    await response.write(_event({"token": event, "gpu": 0}))
        except ConnectionError:
            raise
        except Exception:  # of this generation; the page is told, the log has the rest
            log.exception("a generation failed")
            await response.write(_event({"error": "the generation failed; the server's log says why"}))
            return None
        await response.write(_event({"done": True}))
        return result

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({
            "status": "failed" if self._failed else "ok",
            "ready": not self._failed,
            "num_gpus": len(self._devices),
            "available_workers": self._num_slots - self._scheduler.num_active,
            "model": self._model_info,
            "defaults": asdict(self._defaults),
        })

    async def stats(self, request: web.Request) -> web.Response:
        """A worker is a slot of the batch; all of them share the devices."""
        busy = self._scheduler.num_active
        return web.json_response({
            "total_workers": self._num_slots,
            "available_workers": self._num_slots - busy,
            "busy_workers": busy,
            "queued_requests": self._scheduler.num_waiting,
            "workers": [{"gpu_id": index, "device": device} for index, device in enumerate(self._devices)],
        })

    async def cancel_all(self, app: web.Application) -> None:
        for handle in list(self._live):
            handle.cancel()


def _event(data: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode("utf-8", errors="replace")


async def _read_json(request: web.Request) -> Any:
    """The body, which must say that it is JSON: a form of another site's page cannot."""
    if request.content_type != "application/json":
        raise BadRequest(422, f"the Content-Type must be application/json, not {request.content_type[:50]}")
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise BadRequest(422, f"the body is not JSON: {error}") from error


def _page_file(content: bytes, content_type: str) -> Callable[[web.Request], Any]:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(
            body=content, content_type=content_type, charset="utf-8", headers={"Cache-Control": "no-cache"}
        )

    return handler


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


@web.middleware
async def _answer_errors_in_json(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    try:
        return await handler(request)
    except BadRequest as error:
        headers = {"Retry-After": "5"} if error.status == 503 else {}
        return web.json_response({"detail": error.detail}, status=error.status, headers=headers)
    except web.HTTPException as error:  # no such path or method, or a body over the limit
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        return web.json_response({"detail": error.reason}, status=error.status, headers=headers)


def _log_reply(chat: ChatRequest, result: Result, seconds: float) -> None:
    log.info("%d prompt tokens, %d generated in %.1f s (%s)",
             result.prompt_tokens, len(result.tokens), seconds, result.finish_reason)
    for message in chat.messages:
        log.debug("[%s]: %r", message.role.upper(), message.text)
    log.debug("[ASSISTANT] (GPU 0): %r", result.text)

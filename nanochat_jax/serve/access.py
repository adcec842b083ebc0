"""Checks before every handler (host name, key, origin, body), and error responses."""

import asyncio
import hashlib
import ipaddress
import json
import logging
import re
import secrets
from collections.abc import Callable
from typing import Any

from aiohttp import hdrs, http_exceptions, web

from nanochat_jax.serve.chat_request import BadRequest
from nanochat_jax.serve.metrics import Metrics
from nanochat_jax.serve.settings import ServerConfig

log = logging.getLogger(__name__)

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Server": "nanochat_jax",
}
MAX_BODY_BYTES = 2**20
BODY_SECONDS = 15.0  # for a body to arrive
CONTENT_ENCODINGS = {"", "identity", "gzip", "deflate", "br", "zstd"}  # those that aiohttp decodes
# Paths that need the API key, if the server has one.
GUARDED = ("/chat/completions", "/completions", "/models", "/v1/", "/metrics", "/stats")
# Paths of OpenAI's API; most do not exist here. Not /chat/completions, which is also the page's.
OPENAI_PATHS = tuple(
    "/v1 /audio /completions /embeddings /images /models /moderations /responses".split()
)
OPENAI_ENDPOINTS = "POST /v1/chat/completions, POST /v1/completions and GET /v1/models"
CLIENT_LEFT = 499  # nginx's status for a client that did not wait
RETRY_AFTER = "2"  # seconds, with status 503

OPENAI = web.RequestKey("openai", bool)  # set if the body is for OpenAI's API

Handler = Callable[[web.Request], Any]


async def read_json(request: web.Request) -> Any:
    """The decoded body. It must be JSON in UTF-8 with the Content-Type of JSON.

    A form on another site's page cannot send that Content-Type.

    Raises:
        BadRequest: 422 if the body is not JSON in UTF-8, 400 if it has a wrong Content-Encoding or
            a NaN, 408 if it does not arrive in time.
    """
    if request.content_type != "application/json":
        raise BadRequest(
            422, f"the Content-Type must be application/json, not {request.content_type[:50]}"
        )
    encoding = request.headers.get(hdrs.CONTENT_ENCODING, "")
    if encoding.lower() not in CONTENT_ENCODINGS:
        raise BadRequest(
            400, f"Content-Encoding {encoding[:50]!r} is not supported; use gzip or none"
        )
    if (size := request.content_length or 0) > MAX_BODY_BYTES:  # before a byte of it is read
        raise web.HTTPRequestEntityTooLarge(max_size=MAX_BODY_BYTES, actual_size=size)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await request.read()
    except TimeoutError as error:
        raise BadRequest(408, f"the body did not arrive within {BODY_SECONDS:g} seconds") from error
    except web.RequestPayloadError as error:
        raise BadRequest(400, f"the body cannot be decoded: {_one_line(error)}") from error
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(422, f"the body is not JSON in UTF-8: {error}") from error


def _refuse_constant(name: str) -> None:
    raise BadRequest(400, f"the body is not JSON: JSON has no {name}")


def malformed_on_one_line(record: logging.LogRecord) -> bool:
    """Log filter for aiohttp: logs bytes that are not HTTP on one line, without a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, http_exceptions.HttpProcessingError | web.RequestPayloadError):
        sender = record.args[0] if isinstance(record.args, tuple) and record.args else "a client"
        record.msg, record.args = "%s sent a malformed request: %s", (sender, _one_line(error))
        record.levelno, record.levelname, record.exc_info = logging.INFO, "INFO", None
    return logging.getLogger().isEnabledFor(record.levelno)


def _one_line(error: Exception) -> str:
    """The HTTP parser's message, which quotes the client's bytes on several lines."""
    message = getattr(error, "message", "") or getattr(error.__cause__, "message", "") or str(error)
    line = " ".join(str(message).split())[:200]
    return "".join(char if char.isprintable() else "?" for char in line)


def middlewares(metrics: Metrics, config: ServerConfig, hosts: tuple[str, ...]) -> list[Any]:
    """The middlewares, in the order that requests pass them."""
    return [
        _counting(metrics),
        _errors,
        *([_host_check(hosts)] if "*" not in hosts else []),
        *([_preflight] if config.cors_origins else []),
        *([_key_check(config.key)] if config.key is not None else []),
    ]


def add_headers(cors_origins: tuple[str, ...]) -> Any:
    """A signal handler for all responses. Only pages of these origins ("*": all) may read them."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)
        if not cors_origins:
            return
        response.headers["Vary"] = "Origin"
        origin = request.headers.get(hdrs.ORIGIN)
        if origin and ("*" in cors_origins or origin in cors_origins):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "X-Dropped-Messages, Retry-After"
            if request.method == hdrs.METH_OPTIONS:
                response.headers["Access-Control-Allow-Methods"] = "GET, POST"
                response.headers["Access-Control-Allow-Headers"] = request.headers.get(
                    hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "Authorization, Content-Type"
                )
                response.headers["Access-Control-Max-Age"] = "600"

    return add


def _counting(metrics: Metrics) -> Any:
    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = resource.canonical if resource else "unknown"
        status = CLIENT_LEFT
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            metrics.http_requests.labels(route, str(status)).inc()

    return count


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except BadRequest as error:
        return _error(request, error.status, error.detail, error.param, error.code)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        response = web.Response(status=204)
        if request.method != hdrs.METH_OPTIONS:
            detail = f"{request.path[:80]} takes {allowed}, not {request.method[:20]}"
            response = _error(request, error.status, detail)
        response.headers["Allow"] = allowed
        return response
    except web.HTTPNotFound as error:
        detail = (
            f"{request.method[:20]} {request.path[:80]} does not exist on this server; "
            f"its OpenAI API is {OPENAI_ENDPOINTS}"
        )
        return _error(request, error.status, detail, code="unknown_endpoint")
    except web.HTTPException as error:  # a body over the limit
        return _error(request, error.status, error.reason)
    except ConnectionError as error:
        log.info("a client left: %s", error)
        return web.Response(status=CLIENT_LEFT)  # only counted: nobody reads it
    except Exception:
        log.exception("a request failed")
        return _error(request, 500, "the server failed; its log says why")


def _error(
    request: web.Request,
    status: int,
    detail: str,
    param: str | None = None,
    code: str | None = None,
) -> web.Response:
    """{"detail": text}, or an error in OpenAI's form, in which wrong types are 400 as well."""
    # quoted, because clients wrote them
    log.info("%s %r: %d, %r", request.method, request.raw_path[:200], status, detail[:200])
    body: dict[str, Any] = {"detail": detail}
    if for_openai(request):
        status = 400 if status == 422 else status
        body = error_body(status, detail, param, code)
    headers = {503: {"Retry-After": RETRY_AFTER}, 401: {"WWW-Authenticate": "Bearer"}}.get(
        status, {}
    )
    response = web.json_response(body, status=status, headers=headers)
    if request.content.exception() is not None:  # where the next request begins is unknown
        response.force_close()
    return response


def for_openai(request: web.Request) -> bool:
    """Whether a request is for OpenAI's API: by path, body, or a header of OpenAI's clients."""
    by_header = "X-Stainless-Lang" in request.headers
    return by_header or OPENAI in request or request.path.startswith(OPENAI_PATHS)


def error_body(
    status: int, detail: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's form."""
    error_type = {401: "authentication_error", 404: "not_found_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    return {"error": {"message": detail, "type": error_type, "param": param, "code": code}}


def _host_check(hosts: tuple[str, ...]) -> Any:
    """Refuse unknown host names, against DNS rebinding.

    In that attack, a foreign name resolves to this machine, so the browser takes the attacker's
    page for one of ours. It needs a name, so addresses are accepted.
    """
    names = {"localhost", *(host.lower() for host in hosts)}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.headers.get(hdrs.HOST, "localhost").lower()  # browsers always send one
        name = re.sub(r":\d*$", "", host).rstrip(".")
        if (
            name not in names
            and not name.endswith(".localhost")
            and not _is_address(name.strip("[]"))
        ):
            raise BadRequest(
                403,
                f"this server does not accept the host name {host[:80]!r}: start it with "
                "`nanochat serve --allowed-hosts NAME`",
                code="host_not_allowed",
            )
        return await handler(request)

    return check


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@web.middleware
async def _preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a browser's question before JSON across origins, with the headers of `add_headers`."""
    if (
        request.method == hdrs.METH_OPTIONS
        and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    ):
        return web.Response(status=204)
    return await handler(request)


def _key_check(api_key: str) -> Any:
    expected = hashlib.sha256(api_key.encode()).digest()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(GUARDED):
            scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
            given = hashlib.sha256(key.strip().encode(errors="replace")).digest()
            # Digests, compared in constant time, so that the time reveals nothing of the key.
            if not secrets.compare_digest(given, expected) or scheme.lower() != "bearer":
                problem = "the API key is wrong" if key else "this server requires an API key"
                raise BadRequest(
                    401, f"{problem}: send `Authorization: Bearer KEY`", code="invalid_api_key"
                )
        return await handler(request)

    return check

"""Replies on their way: requests handed to the scheduler, their events, and what can end them
early.

Both APIs stand on this: `Replies.open` queues requests and gives their events, with a deadline,
and with an end when the server shuts down; `EventStream` writes server-sent events to a client
that may go away or stop reading.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from nanochat_jax.infer.request import Request, Result, ToolCall
from nanochat_jax.infer.scheduler import Handle, QueueFull, Scheduler
from nanochat_jax.serve.chat_request import BadRequest
from nanochat_jax.serve.metrics import Metrics

log = logging.getLogger(__name__)

Event = str | ToolCall | Result

# once: json.dumps with an option makes a new encoder each time
encode = json.JSONEncoder(ensure_ascii=False).encode

UNSENT_BYTES = 16 * 1024  # a client with more than this unsent is not reading ...
STALL_SECONDS = 0.75  # ... and is given up if that lasts


class ReplyError(Exception):
    """A reply that broke off, in words for the client. `code` is "timeout", "shutdown" or
    "failed".
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class _Reply:
    """The events of requests queued together, in one queue."""

    def __init__(self, handles: Sequence[Handle]) -> None:
        self.handles = handles
        self.remaining = len(handles)  # whose result has not been read
        self.queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    async def follow(self, index: int) -> None:
        try:
            async for event in self.handles[index]:
                self.queue.put_nowait((index, event))
        except Exception as error:
            self.queue.put_nowait((index, error))

    def break_off(self, error: ReplyError) -> None:
        """Free the slots now; whoever reads the events sees the error after those that came
        before.
        """
        for handle in self.handles:
            handle.cancel()
        self.queue.put_nowait((0, error))


class Replies:
    """All replies of an application, over one scheduler.

    Args:
      deadline: seconds a reply may take, its time in the queue included.
    """

    def __init__(self, scheduler: Scheduler, metrics: Metrics, *, deadline: float) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._deadline = deadline
        self._live: set[_Reply] = set()
        self._closing = False
        self.failed = False  # the engine is gone for good, as a request found out

    @property
    def ready(self) -> bool:
        return not (self.failed or self._closing)

    @asynccontextmanager
    async def open(
        self, requests: Sequence[Request]
    ) -> AsyncIterator[AsyncIterator[list[tuple[int, Event]]]]:
        """Queue requests together; gives their events, each with the index of its request, in
        lists of what has come. Leaving cancels the rest.

        Raises `BadRequest` if they cannot be queued; the events raise `ReplyError` if the reply
        breaks off.
        """
        start = time.perf_counter()
        reply = _Reply(self._submit(requests))
        self._live.add(reply)
        late = ReplyError("timeout", f"the reply took longer than {self._deadline:g} seconds")
        timer = asyncio.get_running_loop().call_later(self._deadline, reply.break_off, late)
        followers = [asyncio.create_task(reply.follow(index)) for index in range(len(requests))]
        try:
            yield self._events(reply, start)
        finally:
            timer.cancel()
            self._live.discard(reply)
            if reply.remaining:
                self._metrics.replies.labels("disconnected").inc()
            for handle, follower in zip(reply.handles, followers, strict=True):
                handle.cancel()  # nothing happens to one that is done
                follower.cancel()

    async def shut_down(self, grace: float) -> None:
        """Take no more requests; let the replies in flight end for `grace` seconds, then break
        them off.
        """
        self._closing = True
        end = time.perf_counter() + grace
        while self._live and time.perf_counter() < end:
            await asyncio.sleep(0.02)
        for reply in self._live:
            reply.break_off(ReplyError("shutdown", "the server is shutting down"))

    def _submit(self, requests: Sequence[Request]) -> list[Handle]:
        if self._closing:
            raise BadRequest(503, "the server is shutting down")
        try:
            return self._scheduler.submit_all(requests)
        except QueueFull as error:
            raise BadRequest(503, f"{error}: try again in a while", code="overloaded") from error
        except ValueError as error:  # such as more choices than ever fit
            raise BadRequest(400, str(error)) from error
        except RuntimeError as error:  # the engine is gone for good; the scheduler has logged why
            self.failed = True
            raise BadRequest(503, f"{error}: restart the server") from error

    async def _events(self, reply: _Reply, start: float) -> AsyncIterator[list[tuple[int, Event]]]:
        first: dict[int, float] = {}
        while reply.remaining:
            came = [await reply.queue.get()]
            while not reply.queue.empty():
                came.append(reply.queue.get_nowait())
            seconds = time.perf_counter() - start
            batch: list[tuple[int, Event]] = []
            error = None
            for index, event in came:
                if isinstance(event, Exception):
                    error = event
                    break
                first.setdefault(index, seconds)
                if isinstance(event, Result):
                    reply.remaining -= 1
                    self._metrics.finished(event, first[index] if event.tokens else None, seconds)
                    log.info(
                        "%d prompt tokens, %d generated in %.1f s (%s)",
                        event.prompt_tokens,
                        len(event.tokens),
                        seconds,
                        event.finish_reason,
                    )
                batch.append((index, event))
            if batch:
                yield batch
            if error is not None and reply.remaining:
                reply.remaining = 0
                raise self._broken(error)

    def _broken(self, error: Exception) -> ReplyError:
        # of this generation; the client is told, the log has the rest
        if not isinstance(error, ReplyError):
            log.error("a generation failed", exc_info=error)
            error = ReplyError("failed", "the generation failed; the server's log says why")
        self._metrics.replies.labels(error.code).inc()
        return error


class EventStream:
    """A response of server-sent events, and a context manager: what fails inside breaks the
    connection off, since it is too late for another response. Sending to a client that went away
    raises ConnectionError.
    """

    def __init__(self, request: web.Request, headers: Mapping[str, str] | None = None) -> None:
        self._request = request
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                **(headers or {}),
            }
        )

    async def __aenter__(self) -> "EventStream":
        await self.response.prepare(self._request)
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            await self.response.write_eof()
        elif isinstance(error, Exception) and not isinstance(error, ConnectionError):
            log.error("a stream failed", exc_info=error)
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the stream failed") from error

    async def send(self, *events: Mapping[str, Any] | str) -> None:
        """Write events, text as it is, together; waits while the client is behind, and gives it up
        if it does not read at all.
        """
        texts = (data if isinstance(data, str) else encode(data) for data in events)
        data = "".join(f"data: {text}\n\n" for text in texts).encode(errors="replace")
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client went away")
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await self.response.write(data)
                while transport.get_write_buffer_size() > UNSENT_BYTES:
                    await asyncio.sleep(0.02)
        except TimeoutError as error:
            transport.abort()
            raise ConnectionResetError("the client stopped reading") from error

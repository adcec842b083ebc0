"""Replies in progress: from the scheduler's events to a client, and what can end them early.

All APIs use `Replies.open`, which queues requests and yields their events. It has a deadline and
ends when the server shuts down. `Replies.scores` computes log-probabilities of tokens that exist
already. `EventStream` writes server-sent events to a client that may leave or stop reading.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from nanochat_jax.infer.request import Request, Result
from nanochat_jax.infer.scheduler import Event, Handle, QueueFull, Scheduler
from nanochat_jax.infer.token_scores import TokenScores, batches, score_tokens
from nanochat_jax.serve.chat_request import BadRequest
from nanochat_jax.serve.metrics import Metrics

log = logging.getLogger(__name__)

# once: json.dumps with an option makes a new encoder each time
encode = json.JSONEncoder(ensure_ascii=False).encode

UNSENT_BYTES = 16 * 1024  # a client with more than this unsent is not reading ...
STALL_SECONDS = 0.75  # ... and is disconnected if that lasts
MOST_SCORINGS = 256  # that may wait for their turn


class ReplyError(Exception):
    """A reply ended early. `detail` is for the client; `code` is a key of `STATUS`."""

    STATUS = {"timeout": 504, "shutdown": 503, "failed": 500}

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail

    @property
    def status(self) -> int:
        return self.STATUS[self.code]


class _Reply:
    """Requests queued together, and the queue of their events."""

    def __init__(self, num_requests: int) -> None:
        self.handles: list[Handle] = []
        self.unfinished = num_requests
        self.queue: asyncio.Queue[tuple[int, list[Event | Exception]]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def receive(self, index: int, events: list[Event | Exception]) -> None:
        """Queue events of one request; called in the scheduler's thread."""
        self._loop.call_soon_threadsafe(self.queue.put_nowait, (index, events))

    def cancel(self) -> None:
        """Free the slots. No effect on requests that are done."""
        for handle in self.handles:
            handle.cancel()

    def break_off(self, error: ReplyError) -> None:
        """Cancel; the reader gets the error after the events that came before it."""
        self.cancel()
        self.queue.put_nowait((0, [error]))


class Replies:
    """All replies of an application. A reply may take `deadline` seconds, queueing included."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics, *, deadline: float) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._deadline = deadline
        self._live: set[_Reply] = set()
        self._closing = False
        self._scoring = asyncio.Lock()
        self._num_scorings = 0
        self.failed = False  # a request was refused because the engine has failed

    @property
    def ready(self) -> bool:
        return not (self.failed or self._closing)

    @asynccontextmanager
    async def open(
        self, requests: Sequence[Request]
    ) -> AsyncIterator[AsyncIterator[list[tuple[int, Event]]]]:
        """Queue requests together; gives lists of (index of the request, event) as they come.

        Leaving the block cancels unfinished requests. Raises `BadRequest` if the requests cannot be
        queued; the iterator raises `ReplyError` if the reply ends early.
        """
        start = time.perf_counter()
        reply = _Reply(len(requests))
        self._submit(requests, reply)
        self._live.add(reply)
        late = ReplyError("timeout", f"the reply took longer than {self._deadline:g} seconds")
        timer = asyncio.get_running_loop().call_later(self._deadline, reply.break_off, late)
        try:
            yield self._events(reply, start)
        finally:
            timer.cancel()
            self._live.discard(reply)
            if reply.unfinished:
                self._metrics.replies.labels("disconnected").inc()
            reply.cancel()

    async def results(self, requests: Sequence[Request]) -> list[Result]:
        """Wait for the results of all requests, in order. Raises `BadRequest`."""
        async with self.open(requests) as events:
            try:
                done = {
                    index: event
                    async for batch in events
                    for index, event in batch
                    if isinstance(event, Result)
                }
            except ReplyError as error:
                raise BadRequest(error.status, error.detail, code=error.code) from error
        return [done[index] for index in range(len(requests))]

    async def scores(self, sequences: Sequence[Sequence[int]], top: int) -> list[TokenScores]:
        """Score sequences of tokens, with the `top` most likely tokens at each position.

        One batch at a time is computed, in another thread, between the engine's dispatches or
        beside them. Raises `BadRequest`.
        """
        if self._closing:
            raise BadRequest(503, "the server is shutting down")
        if self._num_scorings >= MOST_SCORINGS:
            detail = f"{MOST_SCORINGS} requests wait for log-probabilities: try again in a while"
            raise BadRequest(503, detail, code="overloaded")
        engine = self._scheduler.engine
        done: dict[int, TokenScores] = {}
        self._num_scorings += 1
        try:
            async with asyncio.timeout(self._deadline):
                for indices in batches(sequences):
                    batch = [sequences[index] for index in indices]
                    async with self._scoring:
                        scores = await asyncio.to_thread(score_tokens, engine, batch, top)
                    done.update(zip(indices, scores))
        except TimeoutError as error:
            detail = f"the log-probabilities took longer than {self._deadline:g} seconds"
            raise BadRequest(504, detail, code="timeout") from error
        finally:
            self._num_scorings -= 1
        return [done[index] for index in range(len(sequences))]

    async def shut_down(self, grace: float) -> None:
        """Refuse new requests. Replies in progress get `grace` seconds, then they are ended."""
        self._closing = True
        end = time.perf_counter() + grace
        while self._live and time.perf_counter() < end:
            await asyncio.sleep(0.02)
        for reply in self._live:
            reply.break_off(ReplyError("shutdown", "the server is shutting down"))

    def _submit(self, requests: Sequence[Request], reply: _Reply) -> None:
        if self._closing:
            raise BadRequest(503, "the server is shutting down")
        try:
            reply.handles = self._scheduler.submit_all(requests, reply.receive)
        except QueueFull as error:
            raise BadRequest(503, f"{error}: try again in a while", code="overloaded") from error
        except ValueError as error:  # such as more choices than ever fit
            raise BadRequest(400, str(error)) from error
        except RuntimeError as error:  # the engine has failed; the scheduler has logged why
            self.failed = True
            raise BadRequest(503, f"{error}: restart the server") from error

    async def _events(self, reply: _Reply, start: float) -> AsyncIterator[list[tuple[int, Event]]]:
        first: dict[int, float] = {}  # seconds to the first event of each request
        while reply.unfinished:
            received = [await reply.queue.get()]
            while not reply.queue.empty():
                received.append(reply.queue.get_nowait())
            seconds = time.perf_counter() - start
            batch: list[tuple[int, Event]] = []
            error = None
            for index, event in ((index, event) for index, events in received for event in events):
                if isinstance(event, Exception):
                    error = event
                    break
                first.setdefault(index, seconds)
                if isinstance(event, Result):
                    reply.unfinished -= 1
                    self._finished(event, first[index], seconds)
                batch.append((index, event))
            if batch:
                yield batch
            if error is not None and reply.unfinished:
                reply.unfinished = 0
                raise self._reply_error(error)

    def _finished(self, result: Result, first: float, seconds: float) -> None:
        self._metrics.finished(result, first if result.tokens else None, seconds)
        log.info(
            f"{result.prompt_tokens} prompt tokens, {result.cached_tokens} of them cached, "
            f"{len(result.tokens)} generated in {seconds:.1f} s ({result.finish_reason})"
        )

    def _reply_error(self, error: Exception) -> ReplyError:
        """The error for the client, which does not see the details of a failed generation."""
        if not isinstance(error, ReplyError):
            log.error("a generation failed", exc_info=error)
            error = ReplyError("failed", "the generation failed; the server's log says why")
        self._metrics.replies.labels(error.code).inc()
        return error


class EventStream:
    """A response of server-sent events, as a context manager.

    An error inside the block aborts the connection, because it is too late for another response.
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

    async def __aexit__(self, _type: Any, error: BaseException | None, _traceback: Any) -> None:
        if error is None:
            await self.response.write_eof()
        elif isinstance(error, Exception) and not isinstance(error, ConnectionError):
            log.error("a stream failed", exc_info=error)
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the stream failed") from error

    async def send(self, *events: Mapping[str, Any] | str) -> None:
        """Write events together: JSON, or text as it is. Waits for a slow client.

        Raises ConnectionError if the client left, or does not read at all.
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

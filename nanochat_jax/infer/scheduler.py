"""A thread that runs one engine loop for many callers and passes on the generated text."""

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

from nanochat_jax.infer.engine import Engine, EngineLoop
from nanochat_jax.infer.request import Generation, Request, Result, ToolCall

log = logging.getLogger(__name__)

# Text (complete characters, never part of a stop string), tool calls, and finally the result.
Event = str | ToolCall | Result
# Takes the index of a request and its new events. The last event is a `Result`, or the exception
# that ended the generation. Called in the scheduler's thread, so it must not wait. If it raises
# RuntimeError, as `call_soon_threadsafe` of a closed event loop does, the request is cancelled.
Receiver = Callable[[int, list[Event | Exception]], object]


class QueueFull(Exception):
    """The queue is full; try again later."""


class Handle:
    """A submitted request. One consumer can iterate over its events, unless a receiver gets them.

    Iteration raises the exception that ended the generation.
    """

    def __init__(self, generation: Generation, receive: Callable | None = None) -> None:
        self.request = generation.request
        self._generation = generation
        self._cancelled = False
        self._outcome: Future[Result] = Future()
        self._queue: SimpleQueue[list[Event | Exception]] = SimpleQueue()
        self._receive = receive or self._queue.put

    def cancel(self) -> None:
        """Request cancellation. No effect if done; else the result is usually "cancelled"."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called or the receiver is gone."""
        return self._cancelled

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result.

        Raises the generation's error, or TimeoutError after `timeout` seconds.
        """
        return self._outcome.result(timeout)

    def __iter__(self) -> Iterator[Event]:
        while True:
            for event in self._queue.get():
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Result):
                    return

    def _publish(self, events: list[Event | Exception]) -> None:
        if isinstance(events[-1], Result):
            self._outcome.set_result(events[-1])
        elif isinstance(events[-1], Exception):
            self._outcome.set_exception(events[-1])
        try:
            self._receive(events)
        except RuntimeError:
            self._cancelled = True


class Scheduler:
    """Serves requests from any thread with one engine.

    Use as a context manager, or call `start` and `close`. `max_waiting` requests may wait for a
    slot.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 64) -> None:
        self.engine = engine
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Handle] = deque()
        self._live: dict[Generation, Handle] = {}
        self._closing = False
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Scheduler":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_active(self) -> int:
        """Requests in a slot."""
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        if self._thread is not None:
            raise RuntimeError("the scheduler was started before")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after the current step and join the thread. Unfinished requests fail."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def submit(self, request: Request) -> Handle:
        """Queue a request; its events are read from the handle. Raises as `submit_all`."""
        return self.submit_all([request])[0]

    def submit_all(
        self, requests: Sequence[Request], receive: Receiver | None = None
    ) -> list[Handle]:
        """Queue all requests or none.

        Args:
            receive: gets the events of all requests; without it they are read from the handles.

        Raises:
            ValueError: a prompt does not fit the context, a prompt or a stop token has an id
              outside the vocabulary, or there are more requests than slots plus queue positions.
            QueueFull: too many requests wait.
            RuntimeError: the scheduler is not running, or its engine has failed.
        """
        most = self.engine.num_slots + self._max_waiting
        if len(requests) > most:
            raise ValueError(
                f"{len(requests)} requests together are more than {most}, the number of slots "
                "and queue positions"
            )
        handles = [
            Handle(self.engine.generation(request), receive and functools.partial(receive, index))
            for index, request in enumerate(requests)
        ]
        with self._changed:
            if self._failure is not None:
                raise RuntimeError("the engine has failed") from self._failure
            if self._thread is None or self._closing:
                raise RuntimeError("the scheduler is not running")
            # cancelled requests leave before the next step
            waiting = sum(not handle.cancelled for handle in self._waiting)
            # slots that waiting requests get before the next step
            free = self.engine.num_slots - len(self._live)
            if waiting + len(handles) > self._max_waiting + max(0, free):
                raise QueueFull(f"{waiting} requests wait already, of at most {self._max_waiting}")
            self._waiting.extend(handles)
            self._changed.notify_all()
        return handles

    def _run(self) -> None:
        try:
            self._serve(EngineLoop(self.engine))
            message = "the scheduler was closed"
        except Exception as error:
            log.exception("the engine failed; all requests end")
            self._failure = error
            message = f"the engine failed: {error!r}"
        with self._changed:  # no request can be queued from here on
            self._closing = True
        self._deliver()  # events from before the stop
        with self._changed:
            unfinished = [*self._live.values(), *self._waiting]
            self._live.clear()
            self._waiting.clear()
        for handle in unfinished:
            failure = RuntimeError(message)
            failure.__cause__ = self._failure
            handle._publish([failure])

    def _serve(self, loop: EngineLoop) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._live or self._closing)
                if self._closing:
                    break
                # read `cancelled` once: another thread may set it
                taken = [handle for handle in self._waiting if handle.cancelled]
                self._waiting = deque(handle for handle in self._waiting if handle not in taken)
                number = min(loop.num_free, len(self._waiting))
                taken += [self._waiting.popleft() for _ in range(number)]
                admitted = [handle._generation for handle in taken]
                self._live.update(zip(admitted, taken, strict=True))
            for generation, handle in self._live.items():
                if handle.cancelled:
                    loop.cancel(generation)
            if admitted:
                self._deliver()  # their prefill may be slow, compile or fail
            loop.admit([generation for generation in admitted if not generation.done])
            # Otherwise deliver events while the device computes, so that it never waits for I/O.
            loop.step(meanwhile=self._deliver)
        self._deliver()

    def _deliver(self) -> None:
        """Publish new events to every caller and drop finished requests."""
        for generation, handle in list(self._live.items()):
            events: list[Event | Exception] = [*generation.take_events()]
            if generation.done:
                del self._live[generation]
                try:
                    events.append(generation.result())
                except Exception as error:  # only this request failed; its caller gets the error
                    events.append(error)
            if events:
                handle._publish(events)

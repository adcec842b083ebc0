"""The scheduler: many callers, streaming, and failures that reach only those concerned."""

import asyncio
import random
import re
import threading
import time

import pytest
from chain_model import END, OUTPUT_END, PYTHON, PYTHON_END, TOKENIZER, chain_engine

from nanochat_jax.infer.engine import EngineLoop
from nanochat_jax.infer.request import Generation, Request, Result, ToolCall, Vocabulary
from nanochat_jax.infer.scheduler import Handle, QueueFull, Scheduler

SECONDS = 60  # for anything to happen on a busy machine


@pytest.fixture(scope="module")
def engine():
    return chain_engine(
        ("Q:é🙂", PYTHON, "12*3", PYTHON_END), (OUTPUT_END, "ok", END), ("ab",), ("c", END)
    )


@pytest.fixture
def scheduler(engine):
    with Scheduler(engine, max_waiting=4) as scheduler:
        yield scheduler


def ask(text, **options):
    return Request(tuple(text.encode()), **({"temperature": 0.0, "max_tokens": 40} | options))


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fill_slots(scheduler, **options):
    handles = [scheduler.submit(ask("a", **options)) for _ in range(3)]
    wait_until(lambda: scheduler.num_active == 3)
    return handles


class Gate:
    """While closed, the engine's steps do nothing: requests are admitted and none ends."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        step = EngineLoop.step

        def guarded(loop, meanwhile):
            if self.open.is_set():
                step(loop, meanwhile)
            else:
                meanwhile()
                time.sleep(0.002)

        monkeypatch.setattr(EngineLoop, "step", guarded)


def test_events_are_text_then_tool_calls_where_they_happen_then_the_result(scheduler, engine):
    *events, result = scheduler.submit(ask("Q"))
    texts = [event for event in events if isinstance(event, str)]
    assert ToolCall("12*3", "36") in events
    assert "".join(texts) == ":é🙂ok"
    assert not any("\ufffd" in text for text in texts)
    assert "".join(event for event in events[: events.index(ToolCall("12*3", "36"))]) == ":é🙂"
    assert result == engine.generate([ask("Q")])[0]
    assert (result.finish_reason, result.prompt_tokens, result.text) == ("stop", 1, ":é🙂ok")


def test_a_receiver_feeds_one_asyncio_queue_while_the_loop_stays_free(scheduler, engine):
    async def main():
        loop, queue, ticks = asyncio.get_running_loop(), asyncio.Queue(), 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        scheduler.submit_all(
            [ask(text) for text in "QaQc"],
            lambda *received: loop.call_soon_threadsafe(queue.put_nowait, received),
        )
        outcome = [[] for _ in range(4)]
        while not all(events and isinstance(events[-1], Result) for events in outcome):
            index, events = await queue.get()
            outcome[index] += events
        ticking.cancel()
        return outcome, ticks

    outcome, ticks = asyncio.run(main())
    assert ticks > 4
    expected = engine.generate([ask(text) for text in "QaQc"])
    assert [events[-1] for events in outcome] == expected
    assert ["".join(e for e in events if isinstance(e, str)) for events in outcome] == [
        result.text for result in expected
    ]


def test_requests_from_many_threads_each_get_their_own_reply(engine):
    results = {}

    def caller(index):
        text = "Qac"[index % 3]
        results[index] = (text, scheduler.submit(ask(text, max_tokens=10 + index)).result(SECONDS))

    with Scheduler(engine) as scheduler:
        threads = [threading.Thread(target=caller, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index in range(12):
        text, result = results[index]
        assert result == engine.generate([ask(text, max_tokens=10 + index)])[0]


def test_more_than_may_wait_are_refused(scheduler, monkeypatch):
    gate = Gate(monkeypatch)
    running = fill_slots(scheduler)
    waiting = [scheduler.submit(ask("a")) for _ in range(4)]
    with pytest.raises(QueueFull, match="4 requests wait"):
        scheduler.submit(ask("a"))
    assert (scheduler.num_active, scheduler.num_waiting) == (3, 4)
    waiting.pop().cancel()
    waiting.append(scheduler.submit(ask("a")))  # a place that was given up is free at once
    with pytest.raises(QueueFull, match="4 requests wait"):
        scheduler.submit(ask("a"))
    gate.open.set()
    assert all(len(handle.result(SECONDS).tokens) == 40 for handle in running + waiting)
    wait_until(lambda: scheduler.num_active == 0)


def test_a_free_slot_is_no_place_in_the_queue(engine):
    with Scheduler(engine, max_waiting=1) as scheduler:
        replies = [
            handle.result(SECONDS)
            for handle in scheduler.submit_all([ask("a")] * (engine.num_slots + 1))
        ]
        assert [len(reply.tokens) for reply in replies] == [40] * (engine.num_slots + 1)
        # not "try again"
        with pytest.raises(ValueError, match="5 requests together are more than 4"):
            scheduler.submit_all([ask("a")] * (engine.num_slots + 2))


BAD = [
    (lambda: ask("a" * 96), "prompt of 96 tokens does not fit in the context of 96"),
    (lambda: ask(""), "no tokens"),
    (lambda: Request((10**6,)), "outside of the vocabulary"),
    (lambda: Request((-1,)), "outside of the vocabulary"),
    (lambda: ask("a", stop_tokens=("<|nothing|>",)), "unknown stop token '<|nothing|>'"),
    (lambda: ask("a", stop_tokens=(-7,)), "unknown stop token -7"),
]


@pytest.mark.parametrize(("request_", "message"), BAD)
def test_bad_input_is_its_callers_error_alone(scheduler, request_, message):
    other = scheduler.submit(ask("a"))
    with pytest.raises(ValueError, match=re.escape(message)):
        scheduler.submit(request_())
    assert other.result(SECONDS).finish_reason == "length"
    assert scheduler.submit(ask("c")).result(SECONDS).finish_reason == "stop"


def test_requests_submitted_together_are_queued_all_or_none(scheduler, monkeypatch):
    gate = Gate(monkeypatch)
    running = fill_slots(scheduler)
    pair = scheduler.submit_all([ask("a", seed=seed) for seed in range(2)])
    with pytest.raises(QueueFull):
        scheduler.submit_all([ask("a")] * 3)
    with pytest.raises(ValueError, match="does not fit"):
        scheduler.submit_all([ask("a"), ask("a" * 96)])
    assert scheduler.num_waiting == 2
    gate.open.set()
    assert all(handle.result(SECONDS) for handle in running + pair)


def test_first_come_is_first_served(scheduler, engine, monkeypatch):
    gate, order = Gate(monkeypatch), []
    admit = EngineLoop.admit
    monkeypatch.setattr(
        EngineLoop,
        "admit",
        lambda loop, generations: (
            order.extend(each.request.seed for each in generations),
            admit(loop, generations),
        )[1],
    )
    running = [scheduler.submit(ask("a", max_tokens=10 + seed, seed=seed)) for seed in range(3)]
    wait_until(lambda: scheduler.num_active == 3)
    waiting = [
        scheduler.submit(ask("a" * (1 + 20 * (seed % 2)), seed=seed)) for seed in range(3, 7)
    ]
    gate.open.set()
    for handle in running + waiting:
        handle.result(SECONDS)
    assert order == list(range(7))


def test_no_slot_is_lost_when_requests_come_and_go_at_random(engine):
    rng = random.Random(0)
    with Scheduler(engine, max_waiting=30) as scheduler:
        handles = []
        for seed in range(150):
            while scheduler.num_waiting > 20:
                time.sleep(0.002)
            text, max_tokens = rng.choice("Qac") * rng.randint(1, 30), rng.randint(1, 60)
            handles.append(scheduler.submit(ask(text, max_tokens=max_tokens, seed=seed)))
            if rng.random() < 0.5:
                rng.choice(handles).cancel()
        results = [handle.result(SECONDS) for handle in handles]
        assert {result.finish_reason for result in results} == {"stop", "length", "cancelled"}
        wait_until(lambda: (scheduler.num_active, scheduler.num_waiting) == (0, 0))
        handles = scheduler.submit_all([ask("a")] * 3)
        assert [len(handle.result(SECONDS).tokens) for handle in handles] == [40] * 3


def test_cancelling_ends_a_running_and_a_waiting_request(scheduler, monkeypatch):
    gate = Gate(monkeypatch)
    running = fill_slots(scheduler, max_tokens=90)
    waiting = [scheduler.submit(ask("a")) for _ in range(2)]
    running[0].cancel()
    assert running[0].result(SECONDS) == Result([], [], "cancelled", "", 1)
    wait_until(lambda: scheduler.num_active == 3)  # the first to wait has its place
    waiting[1].cancel()
    assert waiting[1].result(SECONDS) == Result([], [], "cancelled", "", 1)
    gate.open.set()
    assert waiting[0].result(SECONDS).finish_reason == "length"
    running[0].cancel()  # nothing happens
    assert list(running[0])[-1].finish_reason == "cancelled"


def test_a_request_cancelled_while_the_queue_is_gone_through_is_not_lost(scheduler, monkeypatch):
    gate = Gate(monkeypatch)
    running = fill_slots(scheduler, max_tokens=90)
    looked_at = threading.Event()

    def cancelled(handle):
        """Cancelled right after the scheduler's first look at it."""
        was = handle._cancelled
        if handle not in running and threading.current_thread().name == "engine":
            handle.cancel()
            looked_at.set()
        return was

    monkeypatch.setattr(Handle, "cancelled", property(cancelled))
    waiting = scheduler.submit(ask("a"))
    assert looked_at.wait(SECONDS)
    gate.open.set()
    assert waiting.result(SECONDS) == Result([], [], "cancelled", "", 1)


def test_a_request_that_fails_fails_alone(scheduler, monkeypatch):
    accept = Generation.accept

    def choke(self, token, **rest):
        if self.request.seed == 13 and len(self.tokens) == 3:
            raise KeyError("cannot be shown")
        accept(self, token, **rest)

    monkeypatch.setattr(Generation, "accept", choke)
    handles = [scheduler.submit(ask("a", seed=seed)) for seed in (12, 13, 14)]
    with pytest.raises(KeyError, match="cannot be shown"):
        list(handles[1])
    assert [handles[i].result(SECONDS).finish_reason for i in (0, 2)] == ["length", "length"]
    assert scheduler.submit(ask("c")).result(SECONDS).finish_reason == "stop"


def test_a_failure_of_the_engine_reaches_everyone(engine, monkeypatch, caplog):
    gate = Gate(monkeypatch)
    decode = EngineLoop.decode
    monkeypatch.setattr(EngineLoop, "decode", lambda *_, **__: 1 / 0)
    with Scheduler(engine) as scheduler:
        handles = [scheduler.submit(ask("a")) for _ in range(5)]
        gate.open.set()
        for handle in handles:
            with pytest.raises(RuntimeError, match="division by zero") as raised:
                list(handle)
            assert isinstance(raised.value.__cause__, ZeroDivisionError)
        wait_until(lambda: not scheduler.num_active)
        monkeypatch.setattr(EngineLoop, "decode", decode)
        with pytest.raises(RuntimeError, match="failed"):
            scheduler.submit(ask("a"))
    assert "the engine failed" in caplog.text


def test_closing_ends_what_is_left_and_joins_the_thread(engine, monkeypatch):
    Gate(monkeypatch)
    scheduler = Scheduler(engine)
    with pytest.raises(RuntimeError, match="not running"):
        scheduler.submit(ask("a"))
    scheduler.start()
    handles = [scheduler.submit(ask("a", max_tokens=90)) for _ in range(5)]
    wait_until(lambda: scheduler.num_active == 3)
    scheduler.close()
    assert "engine" not in {thread.name for thread in threading.enumerate()}
    for handle in handles:
        with pytest.raises(RuntimeError, match="closed"):
            handle.result(SECONDS)
    with pytest.raises(RuntimeError, match="not running"):
        scheduler.submit(ask("a"))
    scheduler.close()  # once more does no harm


def test_a_receiver_whose_event_loop_is_closed_does_not_hurt_the_others(scheduler, monkeypatch):
    gate, loop = Gate(monkeypatch), asyncio.new_event_loop()
    loop.close()
    [handle] = scheduler.submit_all(
        [ask("a", max_tokens=90)], lambda *_: loop.call_soon_threadsafe(print)
    )
    gate.open.set()
    assert scheduler.submit(ask("a")).result(SECONDS).finish_reason == "length"
    assert handle.result(SECONDS).finish_reason == "cancelled" and handle.cancelled


def test_a_call_that_nothing_closes_is_shown_without_a_result():
    vocabulary = Vocabulary(TOKENIZER)
    generation = Generation(Request((0,)), (0,), 3, (), vocabulary)
    for token in (vocabulary.python_start, *TOKENIZER.encode("1+")):
        generation.accept(token, sampled=True)
    assert generation.finish_reason == "length"
    assert generation.take_events() == [ToolCall("1+", None)]


def test_text_streams_before_the_reply_is_done(scheduler):
    events = iter(scheduler.submit(ask("a", max_tokens=90)))
    assert next(events) == "b"
    assert not isinstance(next(events), Result)


def test_waiting_for_a_result_can_time_out(scheduler, monkeypatch):
    gate = Gate(monkeypatch)
    handle = scheduler.submit(ask("a"))
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.01)
    gate.open.set()
    assert handle.result(SECONDS).finish_reason == "length"

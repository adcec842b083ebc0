"""A scheduler that plays a script in place of a model, and an HTTP client of an app over it."""

import asyncio
import functools
import json
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import jax
from aiohttp import web

from nanochat_jax.checkpoint import Loaded
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.programs import Programs
from nanochat_jax.infer.request import Result
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import init_params
from nanochat_jax.serve import server
from nanochat_jax.serve.settings import ServerConfig
from nanochat_jax.tokenizer import Tokenizer

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
SPECIAL = TOKENIZER.special_tokens
MODEL = Loaded(None, {}, TOKENIZER, {}, Path("d4"), 60, "sft")
MODEL_ID = "nanochat-d4-sft"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def messages(*contents, role="user"):
    return {"messages": [{"role": role, "content": content} for content in contents]}


class FakeHandle:
    """Passes on its events; an asyncio.Event among them is waited for, an exception ends them."""

    def __init__(self, events, receive):
        self.cancelled = asyncio.Event()
        self._task = asyncio.create_task(self._play(events, receive))

    def cancel(self):
        self.cancelled.set()

    async def _play(self, events, receive):
        for event in events:
            if isinstance(event, asyncio.Event):
                waits = [asyncio.create_task(end.wait()) for end in (event, self.cancelled)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
                if self.cancelled.is_set():
                    break
            else:
                receive([event])
                if isinstance(event, Exception):
                    return
        text = "".join(event for event in events if isinstance(event, str))
        reason = "cancelled" if self.cancelled.is_set() else "stop"
        receive([Result([1, 2], [True, True], reason, text, 3)])


class FakeEngine:
    """The numbers of its own; weights and vocabulary, for scoring tokens, of `small_engine`."""

    def __init__(self, max_len, num_slots, devices):
        self.max_len, self.num_slots, self.devices = max_len, num_slots, devices
        self.programs = Programs()

    def __getattr__(self, name):
        return getattr(small_engine(), name)


class FakeScheduler:
    num_active, num_waiting = 2, 1

    def __init__(self, *events, error=None, max_len=2048, num_slots=2, devices=("cpu",)):
        self.events, self.error, self.requests, self.handles = events, error, [], []
        self.engine = FakeEngine(max_len, num_slots, devices)

    def submit_all(self, requests, receive):
        if self.error:
            raise self.error
        self.requests += requests
        handles = [
            FakeHandle(self.events, lambda events, index=index: receive(index, events))
            for index in range(len(requests))
        ]
        self.handles += handles
        return handles


@functools.cache
def small_engine():
    config = GPTConfig.modern(
        1, aspect_ratio=32, head_dim=32, sequence_len=64, vocab_size=TOKENIZER.vocab_size
    )
    return Engine(config, init_params(config, jax.random.key(0)), TOKENIZER, num_slots=4)


@asynccontextmanager
async def client(scheduler, *, hosts=("*",), **flags):
    app = server.create_app(scheduler, MODEL, ServerConfig(**flags), hosts)
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


async def events_of(response):
    """The events of a complete stream."""
    text = await response.text()
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]


async def eventually(condition, seconds=5):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)

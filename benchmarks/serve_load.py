"""The server under load: tokens/s, TTFT and gaps between tokens with 1 to 128 clients; robustness.

    python benchmarks/serve_load.py                 d4, 32 slots, compared to one slot and PyTorch
    python benchmarks/serve_load.py --url http://127.0.0.1:8000     a running server only
    python benchmarks/serve_load.py --soak 300      saturation, clients that leave or do not read:
                                                    memory and slots
    python benchmarks/serve_load.py --fuzz 10000    malformed bodies: no 500, no hang

The server is a separate process, with random weights and a vocabulary of 18,500 tokens that are
mostly text, so that one token is one event. Clients send mixed prompts (5 to 60 words, 16 to 160
requested tokens) through OpenAI's streaming API, one after another. Tokens count if they arrive in
the window after a warm-up. TTFT is from the request to the first text, queueing included. A gap is
the time between tokens of a reply at the client; they arrive in bursts of one dispatch. Clients
share the machine's cores with the server. Prints a table, then one JSON line. Exits with 1 if
--soak or --fuzz found a fault.
"""

import argparse
import asyncio
import copy
import importlib.util
import itertools
import json
import os
import random
import re
import signal
import string
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from contender import Contender

# otherwise torch's idle threads use the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
TOKEN = re.compile(rb'"delta": ?\{"content": ?"')  # one per event with text
WORDS = (
    "the of and model that learns to speak in small steps from text it reads all day long until "
    "words come"
).split()


def make_model(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """(tokenizer, config, random parameters)."""
    from decode import make_params, start_jax

    from nanochat_jax.model.config import GPTConfig
    from nanochat_jax.tokenizer import Tokenizer

    start_jax()
    texts = [
        "".join(letters)
        for size in (2, 3)
        for letters in itertools.product(string.ascii_lowercase, repeat=size)
    ]
    tokens = [*(bytes([byte]) for byte in range(256)), *(text.encode() for text in texts)]
    tokenizer = Tokenizer({token: rank for rank, token in enumerate(tokens)})
    config = GPTConfig.classic(
        options.depth, sequence_len=options.context, vocab_size=tokenizer.vocab_size
    )
    return tokenizer, config, make_params(config)


def serve(options: argparse.Namespace, slots: int) -> None:
    """Run the server; prints its port when it is ready."""
    from nanochat_jax.checkpoint import Loaded
    from nanochat_jax.infer.engine import Engine
    from nanochat_jax.infer.scheduler import Scheduler
    from nanochat_jax.infer.warmup import compile_all
    from nanochat_jax.serve import server
    from nanochat_jax.serve.settings import ServerConfig

    tokenizer, config, params = make_model(options)
    engine = Engine(config, params, tokenizer, num_slots=slots)
    compile_all(engine)
    with (
        Scheduler(engine, max_waiting=options.max_queue) as scheduler,
        server.bind("127.0.0.1", 0) as sock,
    ):
        model = Loaded(config, {}, tokenizer, {}, Path("benchmark"), 0, "base")
        app = server.create_app(scheduler, model, ServerConfig(max_tokens=16, timeout=120))
        server.run(app, sock, lambda: print(sock.getsockname()[1], flush=True))


def torch_worker(options: argparse.Namespace) -> None:
    """The same requests one at a time in a plain PyTorch loop, without HTTP and text.

    The upper bound of a server without batching. Answers each line of standard input (seconds) with
    tokens/s in that time and the number of requests.
    """
    import torch
    from torch_reference import GPT, choose

    from nanochat_jax.conversation import render_for_completion

    tokenizer, config, params = make_model(options)
    model, rng = GPT.of(config, params), random.Random(0)

    @torch.inference_mode()
    def tokens_of(body: dict[str, Any]) -> Iterator[int]:
        prompt = render_for_completion(
            tokenizer, {"messages": [*body["messages"], {"role": "assistant", "content": ""}]}
        )
        cache, tokens, position = model.empty_cache(1), torch.tensor([prompt]), 0
        for _ in range(body["max_tokens"]):
            logits = model.extend(tokens, cache, position)
            position, tokens = position + tokens.shape[1], choose(logits, 0.8, 50)
            yield int(tokens)  # for streaming

    for line in sys.stdin:
        began, lengths = time.perf_counter(), []
        while (seconds := time.perf_counter() - began) < float(line):
            lengths.append(sum(1 for _ in tokens_of(make_body(rng))))
        print(json.dumps((sum(lengths) / seconds, len(lengths))), flush=True)


@contextmanager
def server_process(options: argparse.Namespace, slots: int) -> Any:
    """(URL, process id) of a server that is stopped afterwards; of the running one with --url."""
    if options.url:
        yield options.url.rstrip("/"), None
        return
    process = subprocess.Popen(
        [sys.executable, *sys.argv, "--serve", str(slots)], stdout=subprocess.PIPE, text=True
    )
    try:
        port = process.stdout.readline().strip()
        if not port:
            sys.exit("error: the server did not start")
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def make_body(rng: random.Random) -> dict[str, Any]:
    text = " ".join(rng.choices(WORDS, k=rng.randint(5, 60)))
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": rng.randint(16, 160),
        "stream": True,
        "seed": rng.randrange(2**31),
    }


class Tally:
    """Times of tokens and of first tokens at the clients."""

    def __init__(self) -> None:
        self.tokens: list[float] = []  # arrival times
        self.ttft: list[tuple[float, float]] = []  # (arrival time, seconds)
        self.gaps: list[tuple[float, float]] = []
        self.answers: Counter[str] = Counter()


async def ask(session: aiohttp.ClientSession, body: dict[str, Any], tally: Tally) -> None:
    began, last, events, rest = time.perf_counter(), None, b"", b""
    async with session.post("/v1/chat/completions", json=body) as response:
        if response.status != 200:
            tally.answers[str(response.status)] += 1
            await asyncio.sleep(float(response.headers.get("Retry-After", 1)))
            return
        async for data in response.content.iter_any():
            now = time.perf_counter()
            events, _, rest = (rest + data).rpartition(b"\n\n")
            for _ in TOKEN.findall(events):
                tally.tokens.append(now)
                if last is None:
                    tally.ttft.append((now, now - began))
                else:
                    tally.gaps.append((now, now - last))
                last = now
        tally.answers["ok" if events.endswith(b"data: [DONE]") else "broken"] += 1


async def load(
    url: str, clients: int, options: argparse.Namespace, tally: Tally
) -> tuple[float, float]:
    """Send requests for one window; returns its start and end."""
    stop = asyncio.Event()

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        rng = random.Random(number)
        while not stop.is_set():
            await ask(session, make_body(rng), tally)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        tasks = [asyncio.create_task(client(session, number)) for number in range(clients)]
        await asyncio.sleep(options.warmup)
        start = time.perf_counter()
        await asyncio.sleep(options.seconds / options.rounds)
        end = time.perf_counter()
        stop.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return start, end


class Row:
    """One number of clients at one server, over all rounds."""

    def __init__(self, name: str, url: str, clients: int) -> None:
        self.name, self.url, self.clients = name, url, clients
        self.tally, self.windows = Tally(), []
        self.rates: list[float] = []  # tokens/s per round

    def measure(self, options: argparse.Namespace) -> None:
        start, end = asyncio.run(load(self.url, self.clients, options, self.tally))
        self.windows.append((start, end))
        self.rates.append(sum(start <= when <= end for when in self.tally.tokens) / (end - start))

    def percentiles(self, pairs: list[tuple[float, float]]) -> list[float]:
        values = [
            value
            for when, value in pairs
            if any(start <= when <= end for start, end in self.windows)
        ]
        return (
            [round(1000 * float(each), 1) for each in np.percentile(values, [50, 95, 99])]
            if values
            else []
        )

    def numbers(self) -> dict[str, Any]:
        errors = {name: number for name, number in self.tally.answers.items() if name != "ok"}
        return {
            "clients": self.clients,
            "tokens_per_s": round(float(np.median(self.rates)), 1),
            "ttft_ms": self.percentiles(self.tally.ttft),
            "gap_ms": self.percentiles(self.tally.gaps),
            "replies": self.tally.answers["ok"],
            "errors": errors,
        }


class TorchRow(Row):
    """PyTorch, one request at a time."""

    def __init__(self) -> None:
        super().__init__("in PyTorch", "", 1)
        self.contender = Contender("torch")
        self.contender.ask(1)  # loads and warms up

    def measure(self, options: argparse.Namespace) -> None:
        rate, replies = self.contender.ask(options.seconds / options.rounds)
        self.rates.append(rate)
        self.tally.answers["ok"] += replies


def bench(options: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as servers:
        url, _ = servers.enter_context(server_process(options, options.slots))
        rows = [Row(clients, url, int(clients)) for clients in options.clients.split(",")]
        if options.url:
            baselines = [row for row in rows if row.clients == 1]
        else:
            single, _ = servers.enter_context(server_process(options, 1))
            baselines = [Row("of one slot", single, 1)]
            if importlib.util.find_spec("torch"):
                baselines.append(TorchRow())
            rows[:0] = baselines
        # alternating, so that other load on the machine affects all of them
        for _ in range(options.rounds):
            for row in rows:
                row.measure(options)
    print_rows(rows)
    ratios = {}
    for baseline in baselines:
        ratios[baseline.name] = {
            row.clients: round(float(np.median(np.divide(row.rates, baseline.rates))), 2)
            for row in rows
            if row not in baselines
        }
        print(
            f"tokens/s compared to requests one at a time, {baseline.name}:",
            ", ".join(
                f"{count} clients {ratio}x" for count, ratio in ratios[baseline.name].items()
            ),
        )
    return {"rows": [row.numbers() | {"server": row.name} for row in rows], "ratios": ratios}


def print_rows(rows: list[Row]) -> None:
    columns = "{:>12} {:>9} {:>24} {:>22} {:>8} {}"
    names = (
        "clients",
        "tokens/s",
        "TTFT p50/p95/p99 ms",
        "gap p50/p95/p99 ms",
        "replies",
        "errors",
    )
    print(columns.format(*names))
    for row in rows:
        numbers = row.numbers()
        ttft, gap = (
            "/".join(f"{value:g}" for value in numbers[key]) or "-" for key in ("ttft_ms", "gap_ms")
        )
        rate, replies, errors = (numbers[key] for key in ("tokens_per_s", "replies", "errors"))
        print(columns.format(row.name, rate, ttft, gap, replies, errors or 0))


def rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        / 1024
    )


async def soak_client(
    session: aiohttp.ClientSession,
    rng: random.Random,
    stop: asyncio.Event,
    tally: Tally,
    leavers: Counter[str],
) -> None:
    """Send requests until `stop`; leave half of the replies early, and sometimes stop reading."""
    while not stop.is_set():
        body, choice = make_body(rng), rng.random()
        try:
            if choice < 0.5:
                await ask(session, body, tally)
            elif choice < 0.95:
                leavers["left"] += 1
                await asyncio.wait_for(ask(session, body, tally), rng.expovariate(1.0))
            else:
                leavers["stopped reading"] += 1
                async with session.post("/chat/completions", json=body) as response:
                    await asyncio.sleep(2)
                    response.close()
        except TimeoutError:
            pass


async def until_free(session: aiohttp.ClientSession) -> tuple[int, float]:
    """Wait until no slot is in use, at most 30 s. Returns the slots still in use, and seconds."""
    lost, start = 1, time.perf_counter()
    while lost and time.perf_counter() - start < 30:
        await asyncio.sleep(0.1)
        async with session.get("/stats") as response:
            stats = await response.json()
        lost = stats["busy_workers"] + stats["queued_requests"]
    return lost, time.perf_counter() - start


async def soak(url: str, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    """Twice as many clients as slots, which leave at random: slots and memory must be freed."""
    tally, stop, leavers = Tally(), asyncio.Event(), Counter()
    clients = 2 * options.slots
    samples: list[tuple[float, float]] = []
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks = [
            asyncio.create_task(soak_client(session, random.Random(number), stop, tally, leavers))
            for number in range(clients)
        ]
        start = time.perf_counter()
        while (now := time.perf_counter() - start) < options.soak:
            samples.append((now, rss_mib(pid)))
            await asyncio.sleep(0.5)
        stop.set()
        for task in tasks:
            task.cancel()
        outcome = await asyncio.gather(*tasks, return_exceptions=True)
        lost, freed = await until_free(session)
    settled = min(60.0, options.soak / 3)
    sizes = [size for now, size in samples if now >= settled]
    quarter = max(1, len(sizes) // 4)
    growth = float(np.mean(sizes[-quarter:]) / np.mean(sizes[:quarter]) - 1)
    # cancelled clients are not errors
    failed = [repr(error) for error in outcome if isinstance(error, Exception)]
    rss = [round(size) for size in (samples[0][1], sizes[0], sizes[-1])]
    print(
        f"{options.soak:g} s, {clients} clients on {options.slots} slots: {dict(tally.answers)}, "
        f"{dict(leavers)}; clients failed: {failed or 0}\n"
        f"slots lost: {lost}, the last free {freed:.1f} s after all had left\n"
        f"RSS {rss[0]} MiB at first, {rss[1]} after {settled:g} s, {rss[2]} at the end: "
        f"{100 * growth:+.2f}%"
    )
    return {
        "seconds": options.soak,
        "replies": dict(tally.answers),
        "leavers": dict(leavers),
        "slots_lost": lost,
        "all_free_after_s": round(freed, 2),
        "rss_mib": rss,
        "rss_growth": round(growth, 4),
        "clients_failed": failed,
        "ok": not lost and not failed and growth < 0.02,
    }


def fuzzed(rng: random.Random) -> tuple[str, bytes, str]:
    """(path, body, content type) of a request that is mostly malformed."""
    odd: list[Any] = [
        *(None, True, 0, -1, 1.5, 10**30, -(2**63), 1e308, float("nan"), float("inf")),
        *("", "x", "\ud800", "\0", "<|assistant_end|>" * 9, "🙂" * 5000, "x" * 9000),
        *([], {}, [[]], {"type": "text"}, ["user"]),
    ]
    fields = (
        "messages temperature top_k top_p max_tokens max_completion_tokens n seed stop stream "
        "stream_options model tools logprobs unknown"
    ).split()

    def value(depth: int = 0) -> Any:
        choice = rng.random()
        if depth > 3 or choice < 0.7:
            return copy.deepcopy(rng.choice(odd))
        if choice < 0.85:
            return [value(depth + 1) for _ in range(rng.randint(0, 4))]
        names = rng.choices([*fields, "role", "content", "text", "type"], k=rng.randint(0, 4))
        return {name: value(depth + 1) for name in names}

    body: Any = {
        "messages": [
            {"role": rng.choice(["user", "assistant", "system"]), "content": "hello"}
            for _ in range(rng.randint(1, 3))
        ],
        "max_tokens": 2,
    }
    for _ in range(rng.randint(0, 3)):
        target = body
        if isinstance(body.get("messages"), list):
            target = rng.choice([body, *(m for m in body["messages"] if isinstance(m, dict))])
        names = fields if target is body else ["role", "content", "tool_calls"]
        target[rng.choice(names)] = value()
    data = json.dumps(body if rng.random() < 0.95 else value()).encode()
    if rng.random() < 0.2:  # truncated, overwritten or deeply nested
        position = rng.randrange(len(data))
        overwritten = data[:position] + rng.randbytes(3) + data[position:]
        data = rng.choice([data[:position], overwritten, b"[" * 50_000, b"{" * 900 + data])
    odd_types = ["text/plain", "x", "application/json; charset=\xff"]
    content_type = "application/json" if rng.random() < 0.95 else rng.choice(odd_types)
    return rng.choice(["/chat/completions", "/v1/chat/completions"]), data, content_type


async def fuzz(url: str, options: argparse.Namespace) -> dict[str, Any]:
    statuses: Counter[str] = Counter()
    faults: list[str] = []
    numbers = iter(range(options.fuzz))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            path, body, content_type = fuzzed(random.Random(number))
            headers = {"Content-Type": content_type}
            try:
                async with (
                    asyncio.timeout(30),
                    session.post(path, data=body, headers=headers) as response,
                ):
                    text = await response.read()
                    status = str(response.status)
            except Exception as error:
                status, text = type(error).__name__, str(error).encode()
            statuses[status] += 1
            if status not in ("200", "400", "404", "413", "422") or (
                status == "200" and b"the server's log" in text
            ):
                faults.append(f"request {number}: {status} {text[:200]!r} for {body[:200]!r}")

    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session) for _ in range(16)))
        async with session.get("/stats") as response:
            busy = (await response.json())["busy_workers"]
    print(
        f"{options.fuzz} bodies: {dict(statuses)}; faults: {len(faults)}; slots still busy: {busy}",
        *faults[:10],
        sep="\n",
    )
    return {
        "bodies": options.fuzz,
        "statuses": dict(statuses),
        "faults": len(faults),
        "ok": not faults and not busy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--max-queue", type=int, default=128)
    parser.add_argument("--clients", default="1,8,32,128")
    parser.add_argument(
        "--seconds", type=float, default=12, help="window of each row, all rounds together"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="windows it is split into, in turns with those of other rows",
    )
    parser.add_argument("--warmup", type=float, default=1.5, help="seconds before each window")
    parser.add_argument("--url", help="a running server; --slots must be its own")
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    parser.add_argument("--fuzz", type=int, metavar="BODIES")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return torch_worker(options)
    if options.serve:
        serve(options, options.serve)
        return
    if options.soak and options.url:
        parser.error("--soak measures the memory of a server that it starts: leave --url out")
    if options.soak or options.fuzz:
        with server_process(options, options.slots) as (url, pid):
            result = asyncio.run(soak(url, pid, options) if options.soak else fuzz(url, options))
    else:
        result = bench(options)
    print(
        json.dumps(
            {
                "benchmark": "serve_load",
                "depth": options.depth,
                "slots": options.slots,
                "cores": os.cpu_count(),
                **result,
            }
        )
    )
    sys.exit(not result.get("ok", True))


if __name__ == "__main__":
    main()

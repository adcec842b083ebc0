"""Time to the first token of each turn of a conversation, compared to llama.cpp.

    python benchmarks/conversation.py                       d12, 8 turns of about 100 tokens
    python benchmarks/conversation.py --depth 4 --slots 8
    python benchmarks/conversation.py --url http://127.0.0.1:8000       a running server only

Each turn sends the whole conversation so far, as chat clients do. Ours is the server, over HTTP,
from text; its replies are tokenized again when they come back. llama.cpp (llama-cpp-python and
gguf, if installed) runs in a process of its own without HTTP and gets token ids, so it never
tokenizes, and its prefix always matches to the end. Its model has the same layers, width and
vocabulary, and a gated MLP of the same number of parameters. Weights are random and float32.
Conversations alternate between the two; the median over the rounds is printed for each turn. Prints
a table, then one JSON line.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import numpy as np
from contender import Contender
from serve_load import TOKEN, WORDS, serve, server_process

REPLY = 48  # tokens of a reply
QUESTION = 16  # words of a question, about 3 tokens each


async def converse(url: str, options: argparse.Namespace, rng: random.Random) -> list[float]:
    """Seconds to the first token of each turn, over HTTP."""
    messages: list[dict[str, str]] = []
    seconds = []
    async with aiohttp.ClientSession(url) as session:
        for _ in range(options.turns):
            messages.append({"role": "user", "content": " ".join(rng.choices(WORDS, k=QUESTION))})
            body = {"messages": messages, "max_tokens": REPLY, "stream": True, "temperature": 0}
            began, events, first = time.perf_counter(), b"", None
            async with session.post("/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                async for data in response.content.iter_any():
                    events += data
                    if first is None and TOKEN.search(events):
                        first = time.perf_counter() - began
            if first is None:
                sys.exit(f"error: no text in the reply: {events[-300:]!r}")
            seconds.append(first)
            lines = (line[6:] for line in events.splitlines() if line.startswith(b"data: {"))
            choices = [choice for line in lines for choice in json.loads(line)["choices"]]
            reply = "".join(choice["delta"].get("content") or "" for choice in choices)
            messages.append({"role": "assistant", "content": reply})
    return seconds


def write_gguf(path: Path, options: argparse.Namespace, vocab: int) -> None:
    """A Llama of the shape of our model, with random weights."""
    import gguf

    depth, width = options.depth, 64 * options.depth
    heads, hidden = max(1, width // 128), 256 * max(1, round(8 * width / 3 / 256))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(options.context)
    writer.add_embedding_length(width)
    writer.add_block_count(depth)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(width // heads)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{token}" for token in range(vocab)])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([1] * vocab)
    rng = np.random.default_rng(0)

    def add(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), np.float32) * columns**-0.5
        writer.add_tensor(f"{name}.weight", values)

    add("token_embd", vocab, width)
    add("output", vocab, width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(depth):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}", width, width)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}", hidden, width)
        add(f"blk.{layer}.ffn_down", width, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_worker(options: argparse.Namespace) -> None:
    """Answer each line, a seed, with the seconds to the first token of each turn."""
    from llama_cpp import Llama

    vocab = 18_508
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.gguf"
        write_gguf(path, options, vocab)
        threads = os.cpu_count()
        model = Llama(
            str(path),
            n_ctx=options.context,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
    for line in sys.stdin:
        rng = random.Random(int(line))
        tokens, seconds = [1], []
        for _ in range(options.turns):
            tokens += [rng.randrange(3, vocab) for _ in range(3 * QUESTION + 4)]
            began = time.perf_counter()
            # reuses the longest prefix that its cache holds
            for count, token in enumerate(model.generate(tokens, temp=0.0)):
                if count == 0:
                    seconds.append(time.perf_counter() - began)
                tokens = [*tokens, token]
                if count + 1 == REPLY:
                    break
        print(json.dumps(seconds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--url", help="a running server")
    parser.add_argument("--max-queue", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return llama_worker(options)
    if options.serve:
        return serve(options, options.serve)
    missing = [name for name in ("llama_cpp", "gguf") if not importlib.util.find_spec(name)]
    if missing:
        print(f"without llama.cpp: {' and '.join(missing)} not installed")
    with ExitStack() as servers:
        url, _ = servers.enter_context(server_process(options, options.slots))
        llama = None if missing or options.url else Contender("llama")
        ours: list[list[float]] = []
        theirs: list[list[float]] = []
        asyncio.run(converse(url, options, random.Random(0)))  # warm-up
        for seed in range(1, options.rounds + 1):
            ours.append(asyncio.run(converse(url, options, random.Random(seed))))
            if llama:
                theirs.append(llama.ask(seed))
    columns = {"ours": ours} | ({"llama.cpp": theirs} if theirs else {})
    medians = {
        name: [1000 * statistics.median(turn) for turn in zip(*rounds, strict=True)]
        for name, rounds in columns.items()
    }
    load = os.getloadavg()[0]
    print(f"d{options.depth}, {os.cpu_count()} cores, load {load:.1f}; ms to the first token")
    for name, values in medians.items():
        print(f"  {name:10}" + "".join(f"{value:8.0f}" for value in values))
    summary: dict[str, Any] = {"benchmark": "conversation", "depth": options.depth, "ms": medians}
    if theirs:
        summary["ratio"] = [a / b for a, b in zip(*medians.values(), strict=True)]
        print("  ratio     " + "".join(f"{value:8.2f}" for value in summary["ratio"]))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

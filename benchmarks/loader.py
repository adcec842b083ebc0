"""Speed of the data loader, compared to upstream's algorithm with tiktoken.

    python benchmarks/loader.py                      both packings, rows of 2,048, vocabulary 32,768
    python benchmarks/loader.py --train              does a CPU train step wait for the loader?
    python benchmarks/loader.py --corpus DIRECTORY   your own shards, not the offline corpus

From parquet files to numpy batches on the host, tokenized while reading, with BOS before every
document. Rounds alternate between the loaders; the best round counts. The vocabulary is trained on
the corpus first. Upstream's tokenizer also uses all cores. Both must make the same best-fit rows.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tiktoken

from nanochat_jax.data import embedded
from nanochat_jax.data.loader import pretraining_loader
from nanochat_jax.data.shards import iter_documents, split_shards
from nanochat_jax.tokenizer import Tokenizer

VOCAB = 32_768
BLOCK = 10  # steps per turn


def peer_documents(
    paths: list[Path], encoding: tiktoken.Encoding, bos: int, threads: int
) -> Iterator[list[list[int]]]:
    """Up to 128 tokenized documents at a time, by row group, endlessly."""
    while True:
        for path in paths:
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                texts = file.read_row_group(group).column("text").to_pylist()
                for start in range(0, len(texts), 128):
                    part = texts[start : start + 128]
                    documents = encoding.encode_ordinary_batch(part, num_threads=threads)
                    for ids in documents:
                        ids.insert(0, bos)
                    yield documents


def peer_bestfit(
    documents: Iterator[list[list[int]]], rows: int, length: int, buffer_docs: int
) -> Iterator[np.ndarray]:
    """Rows of the longest buffered document that fits, else a part of the shortest."""
    buffer: list[list[int]] = []
    while True:
        batch = np.empty((rows, length + 1), np.int32)
        for row in batch:
            filled = 0
            while filled <= length:
                while len(buffer) < buffer_docs:
                    buffer += next(documents)
                space = length + 1 - filled
                best, best_length = -1, 0
                for i, document in enumerate(buffer):
                    if best_length < len(document) <= space:
                        best, best_length = i, len(document)
                if best < 0:
                    best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
                piece = buffer.pop(best)[:space]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
        yield batch


def peer_stream(
    documents: Iterator[list[list[int]]], rows: int, length: int
) -> Iterator[np.ndarray]:
    """Rows of concatenated documents."""
    tokens: list[int] = []
    needed = rows * length + 1
    while True:
        while len(tokens) < needed:
            for ids in next(documents):
                tokens += ids
        yield np.array(tokens[:needed], np.int32)
        del tokens[:needed]


def rate(batches: Iterator, tokens: int, seconds: float) -> tuple[float, float]:
    """(tokens per second, tokens per second of processor time) over at least `seconds`."""
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        next(batches)
        count += tokens
    return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


def measure_rates(
    corpus: Path, tokenizer: Tokenizer, args: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    shape = dict(batch_size=args.rows, sequence_len=args.length)
    encoding = tiktoken.Encoding(
        "peer",
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.mergeable_ranks,
        special_tokens=tokenizer.special_tokens,
    )
    paths, threads = split_shards(corpus, "train"), os.cpu_count() or 1

    def documents() -> Iterator[list[list[int]]]:
        return peer_documents(paths, encoding, tokenizer.bos_id, threads)

    def ours(packing: str, **options: object) -> Iterator:
        return pretraining_loader(
            corpus, tokenizer, split="train", packing=packing, **shape, **options
        )

    check, expected = (
        ours("bestfit", num_shards=1),
        peer_bestfit(documents(), args.rows, args.length, 1000),
    )
    for _ in range(2):
        batch, rows = next(check), next(expected)
        np.testing.assert_array_equal(batch["inputs"], rows[:, :-1])
        np.testing.assert_array_equal(batch["targets"], rows[:, 1:])
    check.close()

    makers: dict[str, Callable[[], Iterator]] = {
        "best fit, peer": lambda: peer_bestfit(documents(), args.rows, args.length, 1000),
        "best fit, this loader": lambda: ours("bestfit"),
        "stream, peer": lambda: peer_stream(documents(), args.rows, args.length),
        "stream, this loader": lambda: ours("stream"),
    }
    best = dict.fromkeys(makers, (0.0, 0.0))
    for _ in range(args.rounds):
        for name, make in makers.items():
            batches = make()
            next(batches)
            best[name] = max(best[name], rate(batches, args.rows * args.length, args.seconds))
            if hasattr(batches, "close"):
                batches.close()
    return best


def measure_steps(corpus: Path, tokenizer: Tokenizer, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a d4 model's train step, on a fixed batch and on batches from the loader.

    Both alternate in blocks longer than the loader's prefetch.
    """
    import jax

    from nanochat_jax.model.compute import Compute
    from nanochat_jax.model.config import GPTConfig
    from nanochat_jax.model.loss import Batch
    from nanochat_jax.model.sharding import make_mesh
    from nanochat_jax.train.optim import (
        OptimizerConfig,
        Schedules,
        constant,
        linear_momentum,
        make_optimizer,
    )
    from nanochat_jax.train.step import init_state, make_train_step

    rows, length = 4, 256
    model = GPTConfig.modern(
        4, head_dim=64, sequence_len=length, vocab_size=tokenizer.vocab_size, window_pattern="L"
    )
    mesh = make_mesh("auto")
    compute = Compute.on(mesh)
    schedules = Schedules(lr_multiplier=constant(1.0), momentum=linear_momentum(300, 0.85, 0.95))
    optimizer = make_optimizer(model, OptimizerConfig(), schedules, compute)
    state, shardings = init_state(model, optimizer, mesh, fsdp=False, seed=0)
    step = make_train_step(model, optimizer, compute, shardings)
    loader = pretraining_loader(
        corpus, tokenizer, split="train", batch_size=rows, sequence_len=length
    )
    fixed = next(loader)
    seconds: dict[str, list[float]] = {"a fixed batch": [], "the loader": []}
    for count in range(2 * args.steps):
        source = ("a fixed batch", "the loader")[count // BLOCK % 2]
        start = time.perf_counter()
        batch = fixed if source == "a fixed batch" else next(loader)
        state, metrics = step(state, Batch(batch["inputs"][None], batch["targets"][None]))
        jax.block_until_ready(metrics)
        if count:  # the first compiles
            seconds[source].append(time.perf_counter() - start)
    loader.close()
    return {source: statistics.median(values) for source, values in seconds.items()}


def report_steps(about: dict[str, object], seconds: dict[str, float]) -> None:
    for source, value in seconds.items():
        print(f"train step on {source:15} {1000 * value:8.1f} ms")
    ratio = seconds["the loader"] / seconds["a fixed batch"]
    print(f"with the loader it takes {100 * (ratio - 1):+.1f}%")
    print(json.dumps({"benchmark": "loader_step", **about, "ratio": ratio, "seconds": seconds}))


def report_rates(
    about: dict[str, object], rates: dict[str, tuple[float, float]], args: argparse.Namespace
) -> None:
    print(
        f"{about['cores']} cores, vocabulary {about['vocabulary']:,}, rows of {args.length:,} "
        f"tokens, {args.rows} a batch"
    )
    print(f"{'':24} {'M tokens/s':>10} {'per core':>10} {'times the peer':>15}")
    ratios = {}
    for name, (per_second, per_cpu_second) in rates.items():
        packing = name.partition(",")[0]
        ratios[packing] = per_second / rates[f"{packing}, peer"][0]
        print(
            f"{name:24} {per_second / 1e6:10.2f} {per_cpu_second / 1e6:10.2f} "
            f"{ratios[packing]:15.1f}"
        )
    result = {
        "benchmark": "loader",
        **about,
        "rows": args.rows,
        "length": args.length,
        "ratio": ratios,
        "tokens_per_second": {name: value[0] for name, value in rates.items()},
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--corpus", type=Path, help="directory of shards; default: the offline corpus"
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--train", action="store_true", help="time train steps instead")
    parser.add_argument("--steps", type=int, default=20, help="steps on each source of batches")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = args.corpus or Path(scratch) / "corpus"
        if args.corpus is None:
            embedded.build(corpus)
        tokenizer = Tokenizer.train(iter_documents(corpus, "train"), VOCAB)
        about = {
            "cores": os.cpu_count() or 1,
            "load": os.getloadavg()[0],
            "vocabulary": tokenizer.vocab_size,
        }
        if args.train:
            report_steps(about, measure_steps(corpus, tokenizer, args))
        else:
            report_rates(about, measure_rates(corpus, tokenizer, args), args)


if __name__ == "__main__":
    sys.exit(main())

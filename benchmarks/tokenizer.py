"""Tokenizer training and encoding, side by side with what one would use instead.

    pip install rustbpe==0.1.0 tokenizers gigatoken splintr-rs    # what we compare with
    python benchmarks/tokenizer.py [--megabytes 100] [--text DIRECTORY,...]

Trains on text of this machine (documentation first, then Python sources; no file twice) with this
crate, from an iterator and from Parquet, with rustbpe 0.1.0 and with Hugging Face's tokenizers,
each in a process of its own, and compares wall time and peak memory. Ours and rustbpe must learn
the same vocabulary.

Then it encodes part of the text with every encoder that is installed, in a process pinned to one
core and in one pinned to `--threads`. All ids must be equal before anything is timed. Encoders
take turns. Each is made again for every round and sees a tenth of the text first. "unseen" is its
first pass over the rest, "again" its second pass; the tables have the best round and the median, by
processor time for one thread and by wall time for several.
gigatoken only has the pattern with groups of three digits, so the comparison runs for both
patterns; `--ranks` measures it with the tokens of a file, such as cl100k_base's, instead of
trained ones. `--vocab-sizes ""` leaves out training.

At last it encodes texts made to be hard, at two lengths: linear time is a ratio of 10. The last
line is JSON.
"""

import argparse
import base64
import hashlib
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from rich.console import Console
from rich.table import Table

from nanochat_jax import rustbpe
from nanochat_jax.interop.hf_tokenizer import write_hf_tokenizer
from nanochat_jax.tokenizer import RANKS_FILE, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

PROSE, CODE = (".txt", ".md", ".rst", ".html"), (".py",)
DOCUMENT_CHARS = 10_000
ARROW = "ours, from Arrow"
TRAINERS = ("ours", "ours, Parquet", "rustbpe 0.1.0", "tokenizers")

# --------------------------------------------------------------------------------------------------


def files_under(roots: list[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """In an order that mixes the sources and is the same every time."""
    found = [path for root in roots for suffix in suffixes for path in root.rglob(f"*{suffix}")]
    return sorted(found, key=lambda path: hashlib.sha256(str(path).encode()).digest())


def documents(roots: list[Path], num_bytes: int, sizes: Counter) -> Iterator[str]:
    seen = set()
    for path in itertools.chain(files_under(roots, PROSE), files_under(roots, CODE)):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        if path.suffix == ".html":
            text = re.sub(r"<[^>]*>", "", text)
        for start in range(0, len(text), DOCUMENT_CHARS):
            document = text[start : start + DOCUMENT_CHARS]
            sizes[path.suffix] += len(document.encode())
            yield document
            if sizes.total() >= num_bytes:
                return


def write_text(path: Path, texts: Iterator[str]) -> None:
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in iter(lambda: list(itertools.islice(texts, 1024)), []):
            writer.write_table(pa.table([batch], schema=schema))


def read_text(path: Path) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024, columns=["text"]):
            yield from batch.column(0).to_pylist()


# --------------------------------------------------------------------------------------------------


def train(trainer: str, vocab_size: int, path: Path) -> dict:
    """One training, in a process that does nothing else."""
    if trainer == "tokenizers":
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as HuggingFace

        model = HuggingFace(models.BPE())
        split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
        model.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        model.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
        )
        run: Callable[[], object] = lambda: model.train_from_iterator(read_text(path), options)  # noqa: E731
    elif trainer == "ours, Parquet":
        model = rustbpe.Tokenizer()
        run = lambda: model.train_from_parquet([path], vocab_size, SPLIT_PATTERN)  # noqa: E731
    else:
        if trainer == "ours":
            module = rustbpe
        else:
            import rustbpe as module  # the package of that name, not ours
        model = module.Tokenizer()
        run = lambda: model.train_from_iterator(read_text(path), vocab_size, pattern=SPLIT_PATTERN)  # noqa: E731
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "peak_mib": peak_mib()}
    if trainer != "tokenizers":
        tokens = [bytes(token) for token, _ in model.get_mergeable_ranks()]
        result["digest"] = hashlib.sha256(
            b"".join(b"%d " % len(token) + token for token in tokens)
        ).hexdigest()
    return result


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def measure_training(
    trainers: list[str], vocab_size: int, path: Path, repeats: int
) -> dict[str, dict]:
    """The quickest of the runs of each trainer, which take turns."""
    best: dict[str, dict] = {}
    for _ in range(repeats):
        for trainer in trainers:
            command = [sys.executable, __file__, "--child", trainer, str(vocab_size), str(path)]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            if trainer not in best or result["seconds"] < best[trainer]["seconds"]:
                best[trainer] = result
    digests = {result["digest"] for result in best.values() if "digest" in result}
    if len(digests) > 1:
        raise RuntimeError(f"the trainers disagree about the vocabulary of {vocab_size}")
    return best


# --------------------------------------------------------------------------------------------------


def quickest(
    work: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, object]:
    times = []
    for _ in range(repeats):
        start = clock()
        result = work()
        times.append(clock() - start)
    return min(times), result


def encoders(tokenizer: Tokenizer, directory: Path, threads: int) -> Iterator[tuple[str, Callable]]:
    """Name and factory of each encoder. A factory returns the encoder and a function from its
    result to rows of ids.
    """
    ranks, pattern = directory / RANKS_FILE, tokenizer.pattern

    def ours() -> tuple[Callable, Callable]:
        encode = partial(
            Tokenizer(tokenizer.mergeable_ranks, pattern=pattern).encode_batch, num_threads=threads
        )
        return encode, lambda result: np.split(result[0], result[1][1:-1])

    def gigatoken() -> tuple[Callable, Callable]:
        import gigatoken

        encoder = gigatoken.Tokenizer.from_tiktoken(ranks, "gpt4", {})
        return lambda texts: encoder.encode_batch(texts, parallel=threads > 1), list

    def splintr() -> tuple[Callable, Callable]:
        import splintr

        # The same matches without possessive quantifiers, which it refuses.
        plain = pattern.replace("?+", "?").replace("++", "+")
        return splintr.Tokenizer(str(ranks), plain, {}).encode_batch, list

    def reference() -> tuple[Callable, Callable]:
        encoder = tiktoken.Encoding(
            "x", pat_str=pattern, mergeable_ranks=tokenizer.mergeable_ranks, special_tokens={}
        )
        return lambda texts: encoder.encode_ordinary_batch(texts, num_threads=threads), list

    def hugging_face() -> tuple[Callable, Callable]:
        from tokenizers import Tokenizer as HuggingFace

        write_hf_tokenizer(tokenizer, directory, model_max_length=2048)
        encoder = HuggingFace.from_file(str(directory / "tokenizer.json"))
        encoder.encode_special_tokens = True  # names of specials in the text are text
        encode = partial(encoder.encode_batch_fast, add_special_tokens=False)
        return encode, lambda result: [row.ids for row in result]

    yield "ours", ours
    yield ARROW, ours
    if "{1,3}" in pattern:
        yield "gigatoken", gigatoken
    yield "splintr", splintr
    yield "tiktoken", reference
    yield "tokenizers", hugging_face


def measure_encoding(directory: Path, threads: int, repeats: int) -> dict:
    """MB/s by encoder, in this process, which uses `threads` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    tokenizer, texts = Tokenizer.load(directory), list(read_text(directory / "text.parquet"))
    seen, unseen = texts[::10], [text for index, text in enumerate(texts) if index % 10]
    found, missing = {}, []
    for name, make in encoders(tokenizer, directory, threads):
        try:
            encode, rows = make()
        except ImportError:
            missing.append(name)
            continue
        found[name] = make
        ids = [
            np.asarray(row, np.int64)
            for row in rows(encode(pa.array(texts) if name == ARROW else texts))
        ]
        if name == "ours":
            expected = ids
        elif not all(map(np.array_equal, ids, expected)) or len(ids) != len(expected):
            raise RuntimeError(f"{name} returns other ids than our tokenizer")
    seconds: dict[str, tuple[list, list]] = {name: ([], []) for name in found}
    load = os.getloadavg()[0]
    # Other processes take the core away. One thread's processor time leaves that out.
    clock = time.process_time if threads == 1 else time.perf_counter
    for _ in range(repeats):
        for name, make in found.items():
            encode, _ = make()
            encode(seen)
            given = pa.array(unseen) if name == ARROW else unseen
            for times in seconds[name]:
                times.append(quickest(partial(encode, given), 1, clock)[0])
    megabytes = sum(len(text.encode()) for text in unseen) / 1e6
    speeds = {
        name: {
            f"{passage}{suffix}": megabytes / of(times)
            for passage, times in zip(("unseen", "again"), passes)
            for suffix, of in (("", min), ("_median", statistics.median))
        }
        for name, passes in seconds.items()
    }
    return {
        "megabytes": megabytes,
        "mb_per_s": speeds,
        "missing": missing,
        "load": [load, os.getloadavg()[0]],
    }


def compare_encoding(
    console: Console, texts: list[str], ranks: Path | None, threads: int, repeats: int
) -> dict:
    """Both patterns at one thread and at `threads`, each in a process of its own."""
    results: dict[str, dict] = {}
    for digits, pattern in (("2", SPLIT_PATTERN), ("3", SPLIT_PATTERN.replace("{1,2}", "{1,3}"))):
        trainer = rustbpe.Tokenizer()
        if ranks and digits == "3":
            tokens = [base64.b64decode(line.split()[0]) for line in ranks.read_bytes().splitlines()]
            trainer = rustbpe.Tokenizer.from_tokens(tokens, pattern)
        else:
            trainer.train_from_iterator(texts, 32_768, pattern=pattern)
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            Tokenizer(dict(trainer.get_mergeable_ranks()), pattern=pattern).save(directory)
            write_text(directory / "text.parquet", iter(texts))
            for count in sorted({1, threads}):
                command = [
                    sys.executable,
                    __file__,
                    "--child",
                    "encode",
                    name,
                    str(count),
                    str(repeats),
                ]
                result = json.loads(
                    subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                )
                results[f"{digits} digits, {count} thread{'s' * (count > 1)}"] = result
    for title, result in results.items():
        headings = (
            "unseen, MB/s",
            "median",
            "again, MB/s",
            "median",
            "ours / this, unseen",
            "again",
        )
        table = Table("encoder", *headings, title=title)
        ours = result["mb_per_s"]["ours"]
        for name, speed in result["mb_per_s"].items():
            ratios = [f"{ours[passage] / speed[passage]:.2f}" for passage in ("unseen", "again")]
            table.add_row(name, *(f"{rate:.1f}" for rate in speed.values()), *ratios)
        console.print(table)
        before, after = result["load"]
        missing = f"; not installed: {', '.join(result['missing'])}" if result["missing"] else ""
        console.print(
            f"load average {before:.1f} to {after:.1f} on {os.cpu_count()} cores; ids "
            f"equal{missing}"
        )
    one, several = (f"3 digits, {count}" for count in ("1 thread", f"{threads} threads"))
    if several in results:
        for name in ("ours", ARROW):
            rates = [results[title]["mb_per_s"][name]["again"] for title in (one, several)]
            console.print(f"{name}: {threads} threads are {rates[1] / rates[0]:.2f} times one")
    return results


def hard_texts(length: int) -> dict[str, str]:
    rng = random.Random(0)
    noise = rng.randbytes(length)
    return {
        "one word": "".join(rng.choices("etaoinshrdlu", k=length)),
        "one letter repeated": "a" * length,
        "spaces": " " * length,
        "random bytes, U+FFFD for what is no UTF-8": noise.decode("utf-8", "replace"),
        "random bytes as Latin-1": noise.decode("latin-1"),
    }


def measure_hard_texts(tokenizer: Tokenizer) -> dict[str, dict]:
    short, long = hard_texts(1_000_000), hard_texts(10_000_000)
    results = {}
    for name in short:
        (quick, _), (slow, _) = (
            quickest(lambda t=t: tokenizer.encode_batch([t]), 2) for t in (short[name], long[name])
        )
        results[name] = {"seconds": slow, "times_of_a_tenth": slow / quick}
    return results


# --------------------------------------------------------------------------------------------------


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        if sys.argv[2] == "encode":
            directory, threads, repeats = sys.argv[3:]
            print(json.dumps(measure_encoding(Path(directory), int(threads), int(repeats))))
            return
        trainer, vocab_size, path = sys.argv[2:]
        print(json.dumps(train(trainer, int(vocab_size), Path(path))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=100, help="text to train on")
    parser.add_argument("--vocab-sizes", default="32768,65536")
    parser.add_argument(
        "--trainers", default=";".join(TRAINERS), help="which of them, with semicolons between"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of each, of which the best counts"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of the second encoding comparison"
    )
    parser.add_argument("--ranks", type=Path, help="tokens in tiktoken's format (default: trained)")
    here = f"{sysconfig.get_path('purelib')},{sysconfig.get_path('stdlib')},/usr/share"
    parser.add_argument(
        "--text", default=here, help="directories to take text files from, with commas between"
    )
    options = parser.parse_args()
    console = Console()
    figures: dict = {"cores": os.cpu_count(), "training": {}}
    with tempfile.TemporaryDirectory() as directory:
        path, sizes = Path(directory) / "text.parquet", Counter()
        roots = [Path(root) for root in options.text.split(",")]
        write_text(path, documents(roots, options.megabytes * 10**6, sizes))
        figures["text"] = {suffix: round(size / 1e6, 1) for suffix, size in sizes.most_common()}
        parts = ", ".join(f"{size} {suffix}" for suffix, size in figures["text"].items())
        console.print(
            f"{sizes.total() / 1e6:.1f} MB of text ({parts}) from {options.text}; "
            f"{os.cpu_count()} cores"
        )
        for vocab_size in map(int, filter(None, options.vocab_sizes.split(","))):
            results = measure_training(
                options.trainers.split(";"), vocab_size, path, options.repeats
            )
            figures["training"][vocab_size] = results
            table = Table(
                "trainer",
                "seconds",
                "times ours",
                "peak MiB",
                title=f"Training, vocabulary {vocab_size}",
            )
            for trainer, result in results.items():
                ratio = result["seconds"] / next(iter(results.values()))["seconds"]
                table.add_row(
                    trainer, f"{result['seconds']:.2f}", f"{ratio:.2f}", f"{result['peak_mib']:.0f}"
                )
            console.print(table)
        tokenizer = Tokenizer.train(read_text(path), 32_768 + len(SPECIAL_TOKENS))
        # about 5 MB
        texts = list(itertools.islice(read_text(path), 0, None, max(1, options.megabytes // 5)))
    figures["encoding"] = compare_encoding(
        console, texts, options.ranks, options.threads, max(3, options.repeats)
    )
    figures["hard_texts"] = measure_hard_texts(tokenizer)
    table = Table(
        "10 million characters of", "seconds", "times that of 1 million", title="Ours, one thread"
    )
    for name, result in figures["hard_texts"].items():
        table.add_row(name, f"{result['seconds']:.2f}", f"{result['times_of_a_tenth']:.1f}")
    console.print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

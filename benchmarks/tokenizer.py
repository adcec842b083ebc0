"""Tokenizer training and encoding, compared to the alternatives.

    pip install rustbpe==0.1.0 tokenizers      # the others in the comparison
    python benchmarks/tokenizer.py [--megabytes 100] [--vocab-sizes 32768,65536] \\
        [--text DIRECTORY,...]

Trains on text of this machine (documentation first, then Python sources, no file twice) with this
crate, from an iterator and from Parquet, with rustbpe 0.1.0 and with Hugging Face's tokenizers,
each in a separate process, and compares wall time and peak memory. Ours and rustbpe must learn the
same vocabulary. Then encodes part of the text with our tokenizer, tiktoken and tokenizers, whose
ids must be equal. Last, encodes adversarial texts at two lengths: linear time is a ratio of 10. The
last line is JSON.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from rich.console import Console
from rich.table import Table

from nanochat_jax import rustbpe
from nanochat_jax.interop.hf_tokenizer import write_hf_tokenizer
from nanochat_jax.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

PROSE, CODE = (".txt", ".md", ".rst", ".html"), (".py",)
DOCUMENT_CHARS = 10_000
TRAINERS = ("ours", "ours, Parquet", "rustbpe 0.1.0", "tokenizers")

# --------------------------------------------------------------------------------------------------


def files_under(roots: list[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """Files in a fixed order that mixes the sources."""
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
    """One training run, in its own process: seconds, peak memory and digest of the vocabulary."""
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
            import rustbpe as module  # the package of that name
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
    """The fastest run of each trainer; they alternate."""
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


def quickest(work: Callable[[], object], repeats: int) -> tuple[float, object]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return min(times), result


def measure_encoding(
    tokenizer: Tokenizer, texts: list[str], threads: int, repeats: int
) -> dict[str, float]:
    """MB/s by encoder and number of threads; all encoders must give the same ids."""
    from tokenizers import Tokenizer as HuggingFace

    reference = tiktoken.Encoding(
        "reference",
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.mergeable_ranks,
        special_tokens={},
    )
    with tempfile.TemporaryDirectory() as directory:
        write_hf_tokenizer(tokenizer, Path(directory), model_max_length=2048)
        other = HuggingFace.from_file(str(Path(directory) / "tokenizer.json"))
        other.encode_special_tokens = True  # names of special tokens in the text are text
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    column = pa.array(texts)
    results, ids = {}, tokenizer.encode(texts)
    for count in sorted({1, threads}):
        works = {
            "ours": lambda count=count: tokenizer.encode_batch(texts, num_threads=count),
            "ours, Arrow": lambda count=count: tokenizer.encode_batch(column, num_threads=count),
            "tiktoken": lambda count=count: reference.encode_ordinary_batch(
                texts, num_threads=count
            ),
        }
        if count == (os.cpu_count() or 1):  # it always uses all cores
            works["tokenizers"] = lambda: other.encode_batch_fast(texts, add_special_tokens=False)
        for name, work in works.items():
            seconds, encoded = quickest(work, repeats)
            results[f"{name}, {count} thread{'s' * (count > 1)}"] = megabytes / seconds
            if (
                name == "tiktoken"
                and encoded != ids
                or name == "tokenizers"
                and [row.ids for row in encoded] != ids
            ):
                raise RuntimeError(f"{name} gives other ids than ours")
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
        for vocab_size in map(int, options.vocab_sizes.split(",")):
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
        # about 20 MB
        texts = list(itertools.islice(read_text(path), 0, None, max(1, options.megabytes // 20)))
    figures["encoding_mb_per_s"] = encoding = measure_encoding(
        tokenizer, texts, options.threads, max(2, options.repeats)
    )
    table = Table(
        "encoder", "MB/s", "times tiktoken", title="Encoding, vocabulary 32768, ids equal"
    )
    for name, speed in encoding.items():
        base = encoding["tiktoken, " + name.rsplit(", ")[-1]]
        table.add_row(name, f"{speed:.1f}", f"{speed / base:.2f}")
    console.print(table)
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

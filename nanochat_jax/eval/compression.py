"""Compression of a tokenizer, compared to GPT-2's and GPT-4's."""

import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import tiktoken
from rich.console import Console
from rich.table import Table

from nanochat_jax.data.shards import open_shard, read_row_group, split_shards
from nanochat_jax.tokenizer import Tokenizer

SAMPLE_TEXTS = Path(__file__).with_name("compression_texts.json")
BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
DOWNLOAD_SECONDS = 30.0
HEADER = ("Text", "Bytes", "Tokens", "Ratio", "Our tokens", "Our ratio", "Relative diff", "Better")


def measure_compression(
    tokenizer: Tokenizer, corpus: Path
) -> tuple[dict[str, float], list[dict[str, int] | str]]:
    """Bytes per token by text, and the report's content: vocabulary sizes and Markdown tables."""
    texts = evaluation_texts(corpus)
    sizes = {name: len(text.encode()) for name, text in texts.items()}
    ours = {name: _count_tokens(tokenizer, name, text) for name, text in texts.items()}
    results = {f"bytes_per_token_{name}": sizes[name] / ours[name] for name in texts}
    vocab_sizes, tables = {"Ours": tokenizer.vocab_size}, list[str]()
    baselines, missing = load_baselines()
    if missing:
        reasons = ", ".join(sorted({type(error).__name__ for error in missing.values()}))
        names = " and ".join(missing)
        tables.append(f"No comparison with {names}: tiktoken could not download them ({reasons}).")
        print(tables[0])
    for label, baseline in baselines.items():
        theirs = {name: len(baseline.encode_ordinary(text)) for name, text in texts.items()}
        vocab_sizes[label] = baseline.n_vocab
        for name in texts:
            key = f"{BASELINES[label]}_bytes_per_token_{name}"
            results[key] = sizes[name] / theirs[name]
        title = f"Comparison with {label}"
        tables.append(f"### {title}\n\n{_show(title, HEADER, _compare(sizes, theirs, ours))}")
    if not baselines:
        rows = [
            [name, f"{size}", f"{ours[name]}", f"{size / ours[name]:.2f}"]
            for name, size in sizes.items()
        ]
        tables.append(_show("Compression", HEADER[:4], rows))
    sizes_text = ", ".join(f"{label} {size}" for label, size in vocab_sizes.items())
    print(f"Vocabulary sizes: {sizes_text}")
    vocabularies = {f"Vocabulary size, {label}": size for label, size in vocab_sizes.items()}
    return results, [vocabularies, *tables]


def evaluation_texts(corpus: Path) -> dict[str, str]:
    """The sample texts, and the first row group of the training and of the validation split."""
    texts = json.loads(SAMPLE_TEXTS.read_text(encoding="utf-8"))
    for split in ("train", "val"):
        path = split_shards(corpus, split)[0]
        with open_shard(path) as file:
            documents = read_row_group(file, path, 0).to_pylist()
        texts[split] = "\n".join(text for text in documents if text is not None)
    return texts


def _count_tokens(tokenizer: Tokenizer, name: str, text: str) -> int:
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        raise RuntimeError(f"decoding does not restore the text {name!r}")
    return len(ids)


def load_baselines() -> tuple[dict[str, tiktoken.Encoding], dict[str, Exception]]:
    """(encodings from tiktoken's cache or the network, errors of the missing ones), by label.

    tiktoken sets no timeout: threads that hang in it are abandoned until the process exits.
    """
    pool = ThreadPool(len(BASELINES))
    jobs = {
        label: pool.apply_async(tiktoken.get_encoding, (name,)) for label, name in BASELINES.items()
    }
    pool.close()
    loaded: dict[str, tiktoken.Encoding] = {}
    missing: dict[str, Exception] = {}
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    for label, job in jobs.items():
        try:
            loaded[label] = job.get(max(0.0, deadline - time.monotonic()))
        except multiprocessing.TimeoutError:
            missing[label] = TimeoutError(f"no answer in {DOWNLOAD_SECONDS:.0f} s")
        except (OSError, ValueError) as error:  # ValueError: the download is corrupt
            missing[label] = error
    return loaded, missing


def _compare(
    sizes: Mapping[str, int], theirs: Mapping[str, int], ours: Mapping[str, int]
) -> list[list[str]]:
    """Rows of the table: bytes of each text, tokens of both, and the relative difference."""
    rows = []
    for name, size in sizes.items():
        difference = 100 * (theirs[name] - ours[name]) / theirs[name]
        better = "Ours" if difference > 0 else "Theirs" if difference < 0 else "Tie"
        row = [name, f"{size}"]
        for tokens in (theirs[name], ours[name]):
            row += [f"{tokens}", f"{size / tokens:.2f}"]
        rows.append([*row, f"{difference:+.1f}%", better])
    return rows


def _show(title: str, header: Sequence[str], rows: list[list[str]]) -> str:
    """Print a table; returns it in Markdown."""
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row, style={"Ours": "green", "Theirs": "red"}.get(row[-1]))
    Console().print(table)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""Compression of the tokenizer compared to GPT-2's and GPT-4's.

    python -m scripts.tok_eval

tiktoken downloads those two once. Without a network they are left out, with a warning.
"""

import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import tiktoken
from rich.console import Console
from rich.table import Table

from nanochat_jax import cli
from nanochat_jax.cli import flag
from nanochat_jax.data.shards import open_shard, read_row_group, split_shards
from nanochat_jax.files import make_directory
from nanochat_jax.paths import DATA_DIRS, Paths
from nanochat_jax.report import sections
from nanochat_jax.tokenizer import Tokenizer

SAMPLE_TEXTS = Path(__file__).with_name("tok_eval_texts.json")
BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
DOWNLOAD_SECONDS = 30.0
HEADER = ("Text", "Bytes", "Tokens", "Ratio", "Our tokens", "Our ratio", "Relative diff", "Better")


@dataclass(frozen=True, kw_only=True)
class Config:
    data: str = flag(
        "auto", "corpus to take text from; auto takes the one on disk", choices=["auto", *DATA_DIRS]
    )


def evaluation_texts(directory: Path) -> dict[str, str]:
    """The sample texts, and the first row group of the training and of the validation split."""
    texts = json.loads(SAMPLE_TEXTS.read_text(encoding="utf-8"))
    for split in ("train", "val"):
        path = split_shards(directory, split)[0]
        with open_shard(path) as file:
            texts[split] = "\n".join(
                text for text in read_row_group(file, path, 0).to_pylist() if text is not None
            )
    return texts


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


def compare(
    sizes: Mapping[str, int], theirs: Mapping[str, int], ours: Mapping[str, int]
) -> list[list[str]]:
    """Rows of the table: bytes of each text, tokens of both, and the relative difference."""
    rows = []
    for name, size in sizes.items():
        difference = 100 * (theirs[name] - ours[name]) / theirs[name]
        better = "Ours" if difference > 0 else "Theirs" if difference < 0 else "Tie"
        rows.append(
            [
                name,
                f"{size}",
                f"{theirs[name]}",
                f"{size / theirs[name]:.2f}",
                f"{ours[name]}",
                f"{size / ours[name]:.2f}",
                f"{difference:+.1f}%",
                better,
            ]
        )
    return rows


def show(title: str, header: Sequence[str], rows: list[list[str]]) -> str:
    """Print a table; returns it in Markdown."""
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row, style={"Ours": "green", "Theirs": "red"}.get(row[-1]))
    Console().print(table)
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]
    )


def main(config: Config) -> None:
    paths = Paths.from_env()
    make_directory(paths.report)
    tokenizer = Tokenizer.load(paths.tokenizer)
    texts = evaluation_texts(
        paths.data(paths.find_data() if config.data == "auto" else config.data)
    )
    sizes = {name: len(text.encode()) for name, text in texts.items()}
    ours = {}
    for name, text in texts.items():
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            raise RuntimeError(f"the tokenizer does not give back the text {name!r} it encodes")
        ours[name] = len(ids)

    results: dict[str, float] = {
        f"bytes_per_token_{name}": sizes[name] / ours[name] for name in texts
    }
    vocab_sizes, tables = {"Ours": tokenizer.vocab_size}, list[str]()
    baselines, missing = load_baselines()
    if missing:
        reasons = ", ".join(sorted({type(error).__name__ for error in missing.values()}))
        tables.append(
            f"No comparison with {' and '.join(missing)}: tiktoken could not download them "
            f"({reasons})."
        )
        print(tables[0])
    for label, baseline in baselines.items():
        theirs = {name: len(baseline.encode_ordinary(text)) for name, text in texts.items()}
        vocab_sizes[label] = baseline.n_vocab
        results |= {
            f"{BASELINES[label]}_bytes_per_token_{name}": sizes[name] / theirs[name]
            for name in texts
        }
        title = f"Comparison with {label}"
        tables.append(f"### {title}\n\n{show(title, HEADER, compare(sizes, theirs, ours))}")
    if not baselines:
        rows = [
            [name, f"{size}", f"{ours[name]}", f"{size / ours[name]:.2f}"]
            for name, size in sizes.items()
        ]
        tables.append(show("Compression", HEADER[:4], rows))
    print(
        "Vocabulary sizes: " + ", ".join(f"{label} {size}" for label, size in vocab_sizes.items())
    )
    vocabularies = {f"Vocabulary size, {label}": size for label, size in vocab_sizes.items()}
    sections.log_section(
        paths.report,
        "Tokenizer evaluation",
        [vocabularies, *tables],
        stage="tok_eval",
        results=results,
    )


if __name__ == "__main__":
    cli.run(
        main, Config, prog="scripts.tok_eval", description="Measure the tokenizer's compression."
    )

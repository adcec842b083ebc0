"""Train the tokenizer on the text of the training shards.

    python -m scripts.tok_train --max_chars 2_000_000_000 --vocab_size 32768

The result is saved in `tokenizer/` in the base directory, where all later stages read it.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from nanochat_jax import cli
from nanochat_jax.cli import flag
from nanochat_jax.data.shards import open_shard, split_shards, text_size
from nanochat_jax.errors import UsageError
from nanochat_jax.files import make_directory
from nanochat_jax.metrics import Display
from nanochat_jax.paths import DATA_DIRS, Paths
from nanochat_jax.report import sections
from nanochat_jax.tokenizer import Progress, Tokenizer

logger = logging.getLogger(__name__)

ROUND_TRIP_TEXT = (
    "Hello, 世界! I'm 123 years old.\n\n\tdef f(x): return x**2  # naïve café 🙂 <|bos|>"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    data: str = flag(
        "auto", "corpus to train on; auto takes the one on disk", choices=["auto", *DATA_DIRS]
    )
    max_chars: int = flag(
        2_000_000_000,
        "characters to train on, to the end of the document that exceeds them",
        at_least=1,
        at_most=cli.LARGEST,
    )
    doc_cap: int = flag(
        10_000, "characters to take of one document", at_least=1, at_most=cli.LARGEST
    )
    vocab_size: int = flag(
        32_768, "number of tokens, the special ones included", at_least=1, at_most=2**24
    )


STAGES = {"count": "counting characters", "merge": "merging tokens"}


@contextlib.contextmanager
def progress_display(expected_chars: int) -> Iterator[Progress]:
    """Progress of each stage in order."""
    displays: dict[str, Display] = {}

    def close() -> None:
        for display in displays.values():
            display.close()

    def show(stage: str, done: int, total: int | None) -> None:
        if stage == "count" and done != total:
            total = max(done + 1, expected_chars)
        if stage not in displays:
            close()
            displays[stage] = Display(STAGES[stage], total or 0)
        displays[stage].total = total or 0
        displays[stage].update(done)

    try:
        yield show
    finally:
        close()


def main(config: Config) -> None:
    paths = Paths.from_env()
    directory = paths.data(paths.find_data() if config.data == "auto" else config.data)
    logger.info("training a tokenizer of %d tokens on %s", config.vocab_size, directory)
    start = time.perf_counter()
    shards, expected = split_shards(directory, "train"), 0
    for output in (paths.tokenizer, paths.report):
        make_directory(output)
    for path in shards:
        with open_shard(path) as file:
            expected += text_size(file)
    try:
        with progress_display(min(config.max_chars, expected)) as progress:
            tokenizer = Tokenizer.train_from_parquet(
                shards,
                config.vocab_size,
                max_chars=config.max_chars,
                doc_cap=config.doc_cap,
                progress=progress,
            )
    except (ValueError, OSError, pa.ArrowException) as error:
        raise UsageError(" ".join([str(error), *getattr(error, "__notes__", [])])) from error
    train_time = time.perf_counter() - start
    if tokenizer.decode(tokenizer.encode(ROUND_TRIP_TEXT)) != ROUND_TRIP_TEXT:
        raise RuntimeError("the trained tokenizer does not give back the text it encodes")
    tokenizer.save(paths.tokenizer)

    lengths = tokenizer.token_bytes()
    lengths = lengths[lengths > 0]  # without special tokens
    results = {
        "vocab_size": tokenizer.vocab_size,
        "train_time": train_time,
        "num_special_tokens": len(tokenizer.special_tokens),
        "token_bytes_min": int(lengths.min()),
        "token_bytes_max": int(lengths.max()),
        "token_bytes_mean": float(lengths.mean()),
        "token_bytes_std": float(lengths.std()),
    }
    settings = {"data": directory.name, "max_chars": config.max_chars, "doc_cap": config.doc_cap}
    sections.log_section(
        paths.report, "Tokenizer training", [settings, results], stage="tok_train", results=results
    )
    print(
        f"{tokenizer.vocab_size} tokens in {train_time:.1f} s, {lengths.mean():.2f} bytes each on "
        "average"
    )
    print(f"saved to {paths.tokenizer}")


if __name__ == "__main__":
    cli.run(main, Config, prog="scripts.tok_train", description="Train the tokenizer.")

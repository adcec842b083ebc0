"""Train the tokenizer on the text of the training shards.

    python -m scripts.tok_train --max_chars 2_000_000_000 --vocab_size 32768

The result goes to `tokenizer/` in the base directory; every later stage reads it from there.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax import cli, report
from nanochat_jax.cli import UsageError, flag
from nanochat_jax.data.shards import iter_documents
from nanochat_jax.paths import DATA_DIRS, Paths
from nanochat_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ROUND_TRIP_TEXT = "Hello, 世界! I'm 123 years old.\n\n\tdef f(x): return x**2  # naïve café 🙂 <|bos|>"


@dataclass(frozen=True, kw_only=True)
class Config:
    data: str = flag("auto", "corpus to train on; auto takes the one on disk", choices=["auto", *DATA_DIRS])
    max_chars: int = flag(2_000_000_000, "characters to train on")
    doc_cap: int = flag(10_000, "characters to take of one document")
    vocab_size: int = flag(32_768, "number of tokens, the special ones included")

    def __post_init__(self) -> None:
        for name in ("max_chars", "doc_cap"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")


def training_text(directory: Path, max_chars: int, doc_cap: int) -> Iterator[str]:
    """Documents of the training split, cut to `doc_cap` characters, `max_chars` characters in all."""
    left = max_chars
    for text in iter_documents(directory, "train"):
        text = text[: min(doc_cap, left)]
        yield text
        left -= len(text)
        if left == 0:
            return


def main(config: Config) -> None:
    paths = Paths.from_env()
    directory = paths.data(paths.find_data() if config.data == "auto" else config.data)
    logger.info("training a tokenizer of %d tokens on %s", config.vocab_size, directory)
    start = time.perf_counter()
    try:
        tokenizer = Tokenizer.train(training_text(directory, config.max_chars, config.doc_cap), config.vocab_size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    train_time = time.perf_counter() - start
    if tokenizer.decode(tokenizer.encode(ROUND_TRIP_TEXT)) != ROUND_TRIP_TEXT:
        raise RuntimeError("the trained tokenizer does not give back the text it encodes")
    tokenizer.save(paths.tokenizer)

    lengths = tokenizer.token_bytes()
    lengths = lengths[lengths > 0]  # without the specials
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
    report.log_section(paths.report, "Tokenizer training", [settings, results], stage="tok_train", results=results)
    print(f"{tokenizer.vocab_size} tokens in {train_time:.1f} s, {lengths.mean():.2f} bytes each on average")
    print(f"saved to {paths.tokenizer}")


if __name__ == "__main__":
    cli.run(main, Config, prog="scripts.tok_train", description="Train the tokenizer.")

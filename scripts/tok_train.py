"""Train the tokenizer on the text of the training shards.

    python -m scripts.tok_train --max_chars 2_000_000_000 --vocab_size 32768

The result is saved in `tokenizer/` in the base directory, where all later stages read it.
"""

import logging
import time
from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.cli import count, flag
from nanochat_jax.data.shards import split_shards
from nanochat_jax.data.vocabulary import train_tokenizer
from nanochat_jax.files import make_directory
from nanochat_jax.paths import DATA_DIRS, Paths
from nanochat_jax.report import sections

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    data: str = flag(
        "auto", "corpus to train on; auto: the one on disk", choices=["auto", *DATA_DIRS]
    )
    max_chars: int = count(
        2_000_000_000,
        "characters to train on; the document that exceeds them is the last",
        at_most=cli.LARGEST,
    )
    doc_cap: int = count(10_000, "characters to take of one document", at_most=cli.LARGEST)
    vocab_size: int = count(32_768, "number of tokens, special tokens included", at_most=2**24)


def main(config: Config) -> None:
    paths = Paths.from_env()
    directory = paths.data(paths.find_data() if config.data == "auto" else config.data)
    logger.info("training a tokenizer of %d tokens on %s", config.vocab_size, directory)
    start = time.perf_counter()
    shards = split_shards(directory, "train")
    for output in (paths.tokenizer, paths.report):
        make_directory(output)
    tokenizer = train_tokenizer(
        shards, config.vocab_size, max_chars=config.max_chars, doc_cap=config.doc_cap
    )
    train_time = time.perf_counter() - start
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
        f"{tokenizer.vocab_size} tokens in {train_time:.1f} s, {lengths.mean():.2f} bytes per "
        "token on average"
    )
    print(f"saved to {paths.tokenizer}")


if __name__ == "__main__":
    cli.run(main, Config, prog="scripts.tok_train", description=__doc__)

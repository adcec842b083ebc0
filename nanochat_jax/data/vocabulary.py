"""Training the tokenizer on the shards of a corpus."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from nanochat_jax.data.shards import open_shard, text_size
from nanochat_jax.errors import UsageError
from nanochat_jax.metrics import Display
from nanochat_jax.tokenizer import Progress, Tokenizer

ROUND_TRIP_TEXT = (
    "Hello, 世界! I'm 123 years old.\n\n\tdef f(x): return x**2  # naïve café 🙂 <|bos|>"
)
STAGES = {"count": "counting characters", "merge": "merging tokens"}


def train_tokenizer(
    shards: Sequence[Path], vocab_size: int, *, max_chars: int, doc_cap: int
) -> Tokenizer:
    """A tokenizer trained on the text of `shards`; see `Tokenizer.train_from_parquet`.

    Raises `UsageError` for a vocabulary that is too small or a damaged shard.
    """
    expected = 0
    for path in shards:
        with open_shard(path) as file:
            expected += text_size(file)
    try:
        with _progress(min(max_chars, expected)) as progress:
            tokenizer = Tokenizer.train_from_parquet(
                shards, vocab_size, max_chars=max_chars, doc_cap=doc_cap, progress=progress
            )
    except (ValueError, OSError, pa.ArrowException) as error:
        raise UsageError(" ".join([str(error), *getattr(error, "__notes__", [])])) from error
    if tokenizer.decode(tokenizer.encode(ROUND_TRIP_TEXT)) != ROUND_TRIP_TEXT:
        raise RuntimeError("the trained tokenizer does not decode what it encodes to the same text")
    return tokenizer


@contextlib.contextmanager
def _progress(expected_chars: int) -> Iterator[Progress]:
    """Display the progress of the two stages, one after the other."""
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

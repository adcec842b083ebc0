"""Byte-pair encoding, compiled from `rustbpe/`."""

import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa

# Called several times a second as (stage, done, total): characters in the stage "count", where
# total may be None, then merges in the stage "merge".
Progress = Callable[[str, int, int | None], object]

class Tokenizer:
    """A byte-level BPE tokenizer. Ids 0..255 are bytes, followed by the learned merges."""

    def __init__(self) -> None: ...
    @staticmethod
    def from_tokens(tokens: Sequence[bytes], pattern: str) -> Tokenizer:
        """A tokenizer in which `tokens[i]` has the id i.

        Raises ValueError for a missing byte, a repeated token or an invalid pattern.
        """

    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        *,
        progress: Progress | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Learn up to `vocab_size` tokens, from `buffer_size` documents per thread at a time.

        The most frequent pair merges first, on ties the smallest (left id, right id). Training
        stops early if no pair is left. No merge crosses a chunk of `pattern` (default: GPT-4's).
        The result does not depend on `num_threads` (default: the number of cores).

        Raises ValueError for an invalid pattern or a vocab_size below 256, TypeError for an item
        that is not a str, and the exceptions of the iterator, `progress` and signal handlers. After
        an exception, the tokenizer is unchanged.
        """

    def train_from_parquet(
        self,
        paths: Sequence[str | os.PathLike[str]],
        vocab_size: int,
        pattern: str | None = None,
        *,
        column: str = "text",
        max_chars: int | None = None,
        doc_cap: int | None = None,
        progress: Progress | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Like `train_from_iterator`, on the non-null strings of a Parquet column.

        Holds one row group in memory. Documents are truncated to `doc_cap` characters. Reading
        stops after the document that exceeds `max_chars` in total. Also raises pyarrow's
        exceptions, with a note that names the file.
        """

    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """(token, id) of all tokens, in order."""

    def encode(self, text: str) -> list[int]:
        """Equals tiktoken's `encode_ordinary`. Raises UnicodeEncodeError for surrogates."""

    def encode_batch(
        self, texts: Iterable[str], prepend: int | None = None, num_threads: int = 8
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [N], offsets int64 [texts + 1]); each text's ids start with `prepend`, if set.

        Up to `num_threads` threads work, without the GIL, and at most one for each core. The
        tokenizer keeps 18 MiB of caches for each thread.
        """

    def encode_arrow(
        self, array: pa.Array | pa.ChunkedArray, prepend: int | None = None, num_threads: int = 8
    ) -> tuple[np.ndarray, np.ndarray]:
        """Like `encode_batch`, on the non-null strings of an Arrow array, without Python strings.

        Raises TypeError for other arrays and ValueError for strings that are not UTF-8.
        """

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, possibly invalid UTF-8. Raises ValueError for an unknown id."""

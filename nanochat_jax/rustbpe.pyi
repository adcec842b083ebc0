"""Byte-pair encoding, compiled from `rustbpe/`."""

import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa

class Tokenizer:
    """A byte-level BPE tokenizer: ids 0..255 are bytes, then come the learned merges."""

    def __init__(self) -> None: ...
    @staticmethod
    def from_tokens(tokens: Sequence[bytes], pattern: str) -> Tokenizer:
        """A tokenizer of known tokens: token `i` has the id `i`.

        ValueError if one of the 256 bytes is missing, a token is there twice or the pattern is bad.
        """

    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        *,
        progress: Callable[[str, int, int | None], object] | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Learn up to `vocab_size` tokens; `buffer_size` documents go to a thread at a time.

        The most frequent pair merges first, ties go to the smallest (left id, right id), and training stops early
        when no pair is left. `pattern` cuts text into chunks that no merge crosses; the default is GPT-4's.
        `progress(stage, done, total)` is called several times a second: characters in the stage "count", whose total
        is None while unknown, then merges in the stage "merge". The number of threads, by default that of the cores,
        changes nothing about the result.

        Raises ValueError for a bad pattern or a vocab_size below 256, TypeError for an item that is not a str, and
        whatever the iterator, `progress` or a signal handler raises; the tokenizer then stays as it was.
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
        progress: Callable[[str, int, int | None], object] | None = None,
        num_threads: int | None = None,
    ) -> None:
        """The same on a column of strings of Parquet files, without its nulls, a row group in memory at a time.

        Of each document the first `doc_cap` characters count. The document that takes them over `max_chars` together is
        the last, which is whole. Also raises what pyarrow raises, with a note that names the file.
        """

    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """Every token with its rank, which is its id, in order."""

    def encode(self, text: str) -> list[int]:
        """What tiktoken's `encode_ordinary` gives. UnicodeEncodeError if the text has surrogates."""

    def encode_batch(
        self, texts: Iterable[str], prepend: int | None = None, num_threads: int = 8
    ) -> tuple[np.ndarray, np.ndarray]:
        """All ids, int32 [N], and offsets, int64 [len(texts) + 1]; each text's ids start with `prepend`, if given.

        Up to `num_threads` threads work, without the GIL. The tokenizer keeps 18 MiB of caches for each thread.
        """

    def encode_arrow(
        self, array: pa.Array | pa.ChunkedArray, prepend: int | None = None, num_threads: int = 8
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same for the strings of an Arrow array without its nulls, which never become Python strings.

        TypeError if it is no array of strings, ValueError if they are not UTF-8.
        """

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, not necessarily whole UTF-8 characters; ValueError for an id that is not a token's."""

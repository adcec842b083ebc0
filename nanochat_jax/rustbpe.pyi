"""Byte-pair encoding, compiled from `rustbpe/`."""

from collections.abc import Iterable, Sequence

import numpy as np

class Tokenizer:
    """A byte-level BPE tokenizer: ids 0..255 are bytes, then come the learned merges."""

    def __init__(self) -> None: ...
    @staticmethod
    def from_tokens(tokens: Sequence[bytes], pattern: str) -> "Tokenizer":
        """A tokenizer of known tokens: token `i` has the id `i`.

        ValueError if one of the 256 bytes is missing, a token is there twice or the pattern is bad.
        """

    def train_from_iterator(
        self, iterator: Iterable[str], vocab_size: int, buffer_size: int = 8192, pattern: str | None = None
    ) -> None:
        """Learn up to `vocab_size` tokens on all cores; `buffer_size` documents go to a worker at a time.

        The most frequent pair merges first, ties go to the smallest (left id, right id), and training stops early
        when no pair is left. `pattern` cuts text into chunks that no merge crosses; the default is GPT-4's.
        Raises ValueError for a bad pattern or a vocab_size below 256, TypeError for an item that is not a str; on any
        exception the tokenizer stays as it was.
        """

    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """Every token with its rank, which is its id, in order."""

    def encode(self, text: str) -> list[int]:
        """What tiktoken's `encode_ordinary` gives. UnicodeEncodeError if the text has surrogates."""

    def encode_batch(
        self, texts: list[str], prepend: int | None = None, num_threads: int = 8
    ) -> tuple[np.ndarray, np.ndarray]:
        """All ids, int32 [N], and offsets, int64 [len(texts) + 1]; each text's ids start with `prepend`, if given.

        Up to `num_threads` threads work, without the GIL.
        """

    def encode_utf8(
        self, data: bytes | memoryview, offsets: np.ndarray, prepend: int | None = None, num_threads: int = 8
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same for texts in one buffer of UTF-8: text `i` from byte `offsets[i]` to byte `offsets[i + 1]`.

        `offsets` is int64; ValueError if it does not fit the buffer or the bytes are not UTF-8.
        """

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, not necessarily whole UTF-8 characters; ValueError for an id that is not a token's."""

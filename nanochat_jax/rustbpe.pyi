"""Byte-pair encoding, compiled from `rustbpe/`."""

from collections.abc import Iterable, Sequence

class Tokenizer:
    """A byte-level BPE tokenizer: ids 0..255 are bytes, then come the learned merges."""

    def __init__(self) -> None: ...
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

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, not necessarily whole UTF-8 characters; ValueError for an id that is not a token's."""

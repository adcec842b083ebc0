"""Any files become shards: every document once and in order; faults name the file."""

import bz2
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.data.convert import VAL_SHARD, cut_text, read_documents, write_corpus
from nanochat_jax.data.shards import iter_documents, list_shards
from nanochat_jax.errors import UsageError

TEXTS = ["plain", 'two\nlines, and "quotes"', None, "", " \n", "naïve 世界 🙂", "x" * 200_000]


def as_jsonl(texts, field="text"):
    return "".join(
        json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)
    ).encode()


def as_csv(texts, delimiter=",", newline="\n"):
    cells = ['"' + (text or "").replace('"', '""') + '"' for text in texts]
    rows = [f"id{delimiter}text", *(f"{i}{delimiter}{cell}" for i, cell in enumerate(cells))]
    return newline.join(rows).encode()


def as_parquet(table):
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", as_jsonl(TEXTS)),
        ("a.jsonl.gz", gzip.compress(as_jsonl(TEXTS))),
        ("a.json.bz2", bz2.compress(as_jsonl(TEXTS))),
        ("a.csv", as_csv(TEXTS)),
        ("a.TSV", as_csv(TEXTS, "\t")),
        ("b.csv", b"\xef\xbb\xbf" + as_csv(TEXTS, newline="\r\n")),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    found = list(read_documents(tmp_path / name, "text", 0))
    assert [text or "" for text in found] == [text or "" for text in TEXTS]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_of_any_string_type(tmp_path, kind):
    table = pa.table({"id": range(len(TEXTS)), "body": pa.array(TEXTS, pa.string()).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet", "body", 0)) == TEXTS


def test_a_row_group_of_any_size_is_read_in_pieces(tmp_path):
    rows = np.random.default_rng(0).bytes(20_000_000).hex()
    texts = [rows[i : i + 2000] for i in range(0, len(rows), 2000)]
    pq.write_table(
        pa.table({"text": texts}),
        tmp_path / "a.parquet",
        row_group_size=len(texts),
        use_dictionary=False,
    )
    del rows
    before = peak = pa.total_allocated_bytes()
    for text, expected in zip(
        read_documents(tmp_path / "a.parquet", "text", 0), texts, strict=True
    ):
        assert text == expected
        peak = max(peak, pa.total_allocated_bytes())
    assert peak - before < 10_000_000


def test_text_is_cut_where_a_paragraph_ends():
    text = "Title\n\n" + "\n\n".join(f"Paragraph {i}. " + "word " * (20 + i) for i in range(50))
    pieces = list(cut_text(text, 1000))
    assert all(piece.startswith("Paragraph") for piece in pieces[1:]) and len(pieces[0]) > 500
    text += "\n\n" + "x" * 5000 + "\n" + "y " * 700
    pieces = list(cut_text(text, 1000))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert max(map(len, pieces)) <= 1000
    assert list(cut_text(text, 0)) == [text.strip()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.json", b'[{"text": "a"}]', "line 1 is a JSON list: expected one object"),
        (
            "a.jsonl",
            b'{"content": "a", "id": 1}',
            "has no key 'text', only content, id: set `text_field`",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "line 2 is int, expected a string"),
        (
            "a.jsonl",
            b'{"text": "a"}\n' + b"[" * 100_000,
            "line 2 is not JSON .it is nested too deeply",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "n": ' + b"1" * 5000 + b"}",
            "line 1 is not JSON .Exceeds the limit",
        ),
        ("a.csv", b"text,text\n1,a", "has 2 columns 'text'"),
        ("a.csv", b"id,content\n1,a", "has no column 'text', only id, content"),
        ("a.csv", b'text\n"open', "line [12] is not CSV"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(as_jsonl(["a"] * 1000))[:-30], "cannot be read"),
        ("a.parquet", b"PAR1 torn", "is not a readable parquet file"),
        ("a.docx", b"", "is not in a supported format: expected parquet, jsonl"),
        ("a.parquet", as_parquet(pa.table({"n": [1]})), "has no column 'text', only n"),
        ("a.parquet", as_parquet(pa.table({"text": [1]})), "holds int64, expected string"),
        (
            "a.parquet",
            as_parquet(pa.table([["a"], ["b"]], names=["text", "text"])),
            "has 2 columns",
        ),
    ],
)
def test_faults_name_the_file_and_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"{name}.* {message}"):
        list(read_documents(tmp_path / name, "text", 0))


# --------------------------------------------------------------------------------------------------


def numbered(count, start=0):
    return [f"document {i}" for i in range(start, start + count)]


def source(name):
    return {"files": [{"name": name, "sha256": name}], "text_field": "text", "cut_chars": 0}


def write(directory, name, texts, **options):
    options = {"rows_per_shard": 2000, "val_fraction": 0.01} | options
    return write_corpus(directory, source(name), texts, **options)


def test_every_document_is_in_one_split_once_and_in_order(tmp_path):
    corpus = tmp_path / "corpus"
    texts = [text for number in numbered(5000) for text in (number, None, "", " ")]
    entry = write(corpus, "a", texts)
    assert (entry["rows"], entry["documents"]) == (20_000, 5000)
    assert entry["skipped"] == 15_000 and entry["val_documents"] == 50
    train, val = list(iter_documents(corpus, "train")), list(iter_documents(corpus, "val"))
    assert val == numbered(5000)[::100]
    assert train == [text for i, text in enumerate(numbered(5000)) if i % 100]
    assert [path.name for path in list_shards(corpus)] == [
        *(f"shard_{i:05d}.parquet" for i in range(3)),
        VAL_SHARD,
    ]
    metadata = pq.ParquetFile(corpus / "shard_00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [1024, 976]
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", ".corpus.lock"}


@pytest.mark.parametrize("val_fraction", [0, 0.001, 0.5, 0.9])
@pytest.mark.parametrize("count", [2, 3, 100])
def test_a_small_corpus_has_a_training_and_a_validation_shard(tmp_path, count, val_fraction):
    entry = write(tmp_path / "corpus", "a", numbered(count), val_fraction=val_fraction)
    parts = [list(iter_documents(tmp_path / "corpus", split)) for split in ("train", "val")]
    assert sorted(parts[0] + parts[1]) == sorted(numbered(count)) and all(parts)
    assert (
        len(parts[1]) == entry["val_documents"] and abs(len(parts[1]) - count * val_fraction) <= 1
    )


def test_a_source_that_breaks_leaves_nothing(tmp_path):
    def broken():
        yield from numbered(3000)
        raise UsageError("a.jsonl line 3001 is not JSON")

    with pytest.raises(UsageError, match="line 3001"):
        write(tmp_path / "corpus", "a", broken())
    assert {path.name for path in tmp_path.iterdir()} == {".corpus.lock"}


def test_a_corpus_on_another_disk_is_written_and_added_to_there(tmp_path):
    disk, link = tmp_path / "disk", tmp_path / "corpus"
    disk.mkdir()
    (disk / "lost+found").mkdir()
    link.symlink_to(disk)
    write(link, "a", numbered(100))
    write(link, "b", numbered(100, 1000), append=True)
    assert link.is_symlink() and {path.parent for path in list_shards(link)} == {link}
    found = [text for split in ("train", "val") for text in iter_documents(link, split)]
    assert (
        sorted(found) == sorted(numbered(100) + numbered(100, 1000))
        and len(list(disk.glob("*.parquet"))) == 3
    )


def test_another_corpus_is_added_only_when_told_to_and_only_once(tmp_path):
    corpus = tmp_path / "corpus"
    write(corpus, "a", numbered(100))
    before = {path.name: path.read_bytes() for path in corpus.iterdir()}
    with pytest.raises(UsageError, match="already holds a: set `append` to add to it"):
        write(corpus, "b", numbered(100, 1000))
    assert write(corpus, "a", numbered(100)) is None
    assert {path.name: path.read_bytes() for path in corpus.iterdir()} == before
    write(corpus, "b", numbered(300, 1000), append=True)
    assert write(corpus, "b", numbered(300, 1000), append=True) is None
    assert list(iter_documents(corpus, "val")) == ["document 0", *numbered(300, 1000)[::100]]
    assert len(list(iter_documents(corpus, "train"))) == 99 + 297
    assert (corpus / "shard_00000.parquet").read_bytes() == before["shard_00000.parquet"]


@pytest.mark.parametrize("before_b", [True, False], ids=["append", "new"])
@pytest.mark.parametrize("moves", range(5))
def test_a_corpus_whose_process_was_killed_loses_nothing_and_adds_nothing_twice(
    tmp_path, monkeypatch, before_b, moves
):
    corpus = tmp_path / "corpus"
    if before_b:
        write(corpus, "a", numbered(100))
    rename, replace, done = Path.rename, Path.replace, []

    def killed(path, target):
        if path.name == ".partial" or path.parent.name == ".complete":
            done.append(path)
            if len(done) > moves:
                raise KeyboardInterrupt
        return (rename if path.name == ".partial" else replace)(path, target)

    def write_b():
        return write(corpus, "b", numbered(300, 1000), append=True, rows_per_shard=200)

    monkeypatch.setattr(Path, "rename", killed)
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_b()
    monkeypatch.undo()
    if moves:
        with pytest.raises(UsageError, match="is being written, or its writing was interrupted"):
            list_shards(corpus)
    elif before_b:
        assert len(list(iter_documents(corpus, "train"))) == 99
    write_b()
    assert list(iter_documents(corpus, "val")) == [
        *["document 0"] * before_b,
        *numbered(300, 1000)[::100],
    ]
    assert len(list(iter_documents(corpus, "train"))) == 99 * before_b + 297
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", ".corpus.lock"}


def test_files_of_unknown_origin_are_left_alone(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "shard_00000.parquet").write_bytes(b"mine")
    with pytest.raises(UsageError, match="holds files of another origin"):
        write(corpus, "a", numbered(100), append=True)
    assert (corpus / "shard_00000.parquet").read_bytes() == b"mine"


def test_half_surrogate_pairs_become_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        r'{"text": "a\ud800b"}' + "\n" + r'{"text": "c\ud83d\ude42"}', encoding="utf-8"
    )
    write(tmp_path / "corpus", "a", read_documents(tmp_path / "a.jsonl", "text", 0))
    found = [
        *iter_documents(tmp_path / "corpus", "val"),
        *iter_documents(tmp_path / "corpus", "train"),
    ]
    assert found == ["a\ufffdb", "c🙂"]


FULL = """
import resource, signal
from pathlib import Path
from nanochat_jax.data.convert import write_corpus
from nanochat_jax.errors import UsageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_corpus(Path("corpus"), {"files": [{"name": "a"}]}, (f"{i**99}" for i in range(99_999)),
                 rows_per_shard=50_000, val_fraction=0.01)
except UsageError as error:
    print(error)
"""


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", FULL], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        "cannot write corpus/.partial/shard_00000.parquet: " in result.stdout
        and "File too large" in result.stdout
    )
    assert {path.name for path in tmp_path.iterdir()} == {".corpus.lock"}


# --------------------------------------------------------------------------------------------------


def test_local_files_and_directories(tmp_path, command):
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.md").write_text("# Title\n\n" + "Some words. " * 1000)  # 7 pieces
    (folder / "deeper" / "b.jsonl").write_bytes(as_jsonl(numbered(50)))
    (folder / "picture.png").write_bytes(b"no text")
    code, out, _ = command("local", folder, "--val-fraction", "0.1", "--cut-chars", "2000")
    assert code == 0 and "57 documents (6 for validation)" in out
    corpus = tmp_path / "base" / "base_data_custom"
    assert set(numbered(50)) < {*iter_documents(corpus, "train"), *iter_documents(corpus, "val")}
    code, out, _ = command("local", folder, "--cut-chars", "2000")
    assert code == 0 and "already" in out
    (folder / "a.md").write_text("changed")
    code, _, err = command("local", folder, "--cut-chars", "2000")
    assert code == 2 and "set --append to add to it" in err
    code, out, _ = command("info")
    assert (
        code == 0
        and "custom, in" in out
        and "51 documents" in out
        and "base_train: too small a corpus" in out
    )


def test_what_is_left_out_of_directories_and_given_twice_is_logged(tmp_path, command):
    folder, cut = tmp_path / "texts", ("--cut-chars", "50")
    (folder / ".venv").mkdir(parents=True)
    (folder / "a.txt").write_text("one two " * 30)
    for name in (".venv/licence.txt", ".hidden.txt", "b.pdf"):
        (folder / name).write_text("not this " * 30)
    (folder / "linked").symlink_to(tmp_path)
    same, link, new = (tmp_path / f"{name}.txt" for name in ("same", "link", "new"))
    same.hardlink_to(folder / "a.txt")
    link.symlink_to(folder / "a.txt")
    code, _, err = command("local", *cut, folder, same, link, f"{folder}/../texts/a.txt")
    assert code == 0 and err.count("is read once") == 3 and f"{folder}: 4 hidden entries" in err
    new.write_text("three four " * 30)
    assert "it is already in" in command("local", "--append", *cut, link, new)[2]
    assert "already" in command("local", "--append", *cut, link)[1]
    corpus = tmp_path / "base" / "base_data_custom"
    texts = " ".join([*iter_documents(corpus, "train"), *iter_documents(corpus, "val")])
    counts = [texts.count(word) for word in ("one", "three", "not this")]
    assert counts == [30, 30, 0]
    code, _, err = command("local", folder / ".venv")  # named by the user
    assert code == 2 and "set --append to add to it" in err


@pytest.mark.parametrize(
    "manifest", ["[" * 100_000, "3", '{"sources": [3]}', '{"sources": [{"source": {}}]}']
)
def test_a_damaged_manifest_is_refused(tmp_path, command, manifest):
    corpus = tmp_path / "base" / "base_data_custom"
    write(corpus, "a", numbered(10))
    (corpus / "manifest.json").write_text(manifest)
    code, _, err = command("info")
    assert code == 2 and "manifest.json is damaged" in err


def test_too_few_documents_leave_nothing(tmp_path):
    for texts, held in ([], "no text"), ([None, " "], "no text"), (["one"], "only one document"):
        with pytest.raises(UsageError, match=f"holds {held}: a corpus needs two"):
            write(tmp_path / "corpus", "a", texts)
    assert not (tmp_path / "corpus").exists()

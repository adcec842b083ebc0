"""Shards come back in order, virtual shards share them out, and damage is named."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.data.documents import DocumentStream, Position, ShardReader
from nanochat_jax.data.shards import iter_documents, list_shards, split_shards, write_shards
from nanochat_jax.errors import NotFound, UsageError


def numbered(count, start=0):
    return [f"document {i}" for i in range(start, start + count)]


def encode(texts):
    """The bytes of the texts as tokens."""
    parts = [np.frombuffer(text.encode(), np.uint8) for text in texts.to_pylist()]
    return np.concatenate(parts), np.cumsum([0, *map(len, parts)])


def decode(documents):
    return [bytes(tokens.astype(np.uint8)).decode() for tokens in documents]


def make_stream(reader, shard=0, num_shards=1):
    return DocumentStream(reader, encode, shard, num_shards)


def next_batch(stream):
    positions, tokens = zip(*stream.next_batch(), strict=True)
    return list(zip(positions, decode(tokens), strict=True))


def one_pass(reader, shard, num_shards):
    stream, texts = make_stream(reader, shard, num_shards), []
    while stream.position.epoch == 0:
        texts += [text for _, text in next_batch(stream)]
    return texts


def test_documents_come_back_in_order(tmp_path):
    texts = numbered(5000)
    paths = write_shards(
        iter(texts), tmp_path / "corpus", rows_per_shard=2048, val_texts=numbered(10, 9000)
    )
    assert [path.name for path in paths] == [f"shard_{i:05d}.parquet" for i in range(4)]
    assert list_shards(tmp_path / "corpus") == paths
    assert list(iter_documents(tmp_path / "corpus", "train")) == texts
    assert list(iter_documents(tmp_path / "corpus", "val")) == numbered(10, 9000)
    metadata = pq.ParquetFile(paths[0]).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [1024, 1024]
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_writing_leaves_nothing_where_it_fails_and_never_mixes_corpora(tmp_path):
    def broken():
        yield from numbered(2000)
        raise OSError("the source broke")

    with pytest.raises(OSError, match="the source broke"):
        write_shards(broken(), tmp_path / "corpus", rows_per_shard=1024, val_texts=["v"])
    with pytest.raises(UsageError, match="no validation documents"):
        write_shards(["a"], tmp_path / "corpus", rows_per_shard=1024, val_texts=[])
    assert list(tmp_path.iterdir()) == []
    write_shards(["a"], tmp_path / "corpus", rows_per_shard=1024, val_texts=["v"])
    with pytest.raises(UsageError, match="not an empty directory"):
        write_shards(["b"], tmp_path / "corpus", rows_per_shard=1024, val_texts=["v"])


@pytest.mark.parametrize(
    ("files", "rows_per_group", "num_shards"),
    [
        (1, [1] * 9, 8),
        (3, [7, 7, 2], 1),
        (3, [7, 7, 2], 2),
        (3, [7, 7, 2], 8),
        (2, [3] * 20, 8),
        (1, [9], 8),
    ],
)
def test_virtual_shards_share_out_every_document_once(tmp_path, files, rows_per_group, num_shards):
    ids = itertools.count()
    paths = []
    for file in range(files):
        paths.append(tmp_path / f"shard_{file}.parquet")
        with pq.ParquetWriter(paths[-1], pa.schema([("text", pa.string())])) as writer:
            for rows in rows_per_group:
                writer.write_table(pa.table({"text": [str(next(ids)) for _ in range(rows)]}))
    reader = ShardReader(paths)
    parts = [one_pass(reader, shard, num_shards) for shard in range(num_shards)]
    assert sorted(itertools.chain(*parts), key=int) == [str(i) for i in range(next(ids))]
    assert all(part == sorted(part, key=int) for part in parts)


def test_missing_values_are_skipped(tmp_path):
    path = tmp_path / "shard_0.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", None, "", None, "b"])}), path)
    batch = next_batch(make_stream(ShardReader([path])))
    assert batch == [(Position(row=0), "a"), (Position(row=2), ""), (Position(row=4), "b")]
    pq.write_table(pa.table({"text": pa.array(["v"])}), tmp_path / "shard_1.parquet")
    assert list(iter_documents(tmp_path, "train")) == ["a", "", "b"]


@pytest.mark.parametrize("texts", [[None, None], []])
def test_a_corpus_without_a_text_is_an_error_not_a_hang(tmp_path, texts):
    path = tmp_path / "shard_0.parquet"
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    with pytest.raises(
        UsageError, match=f"virtual shard 0 of 1 finds no (document|text) in {tmp_path}"
    ):
        make_stream(ShardReader([path])).next_batch()


def test_a_shard_that_changes_or_vanishes_during_the_run_is_named(tmp_path):
    paths = write_shards(numbered(3000), tmp_path / "corpus", rows_per_shard=1024, val_texts=["v"])
    reader = ShardReader(paths[:-1])
    for _ in range(8):
        make_stream(reader).next_batch()
    paths[1].write_bytes(paths[-1].read_bytes())
    with pytest.raises(UsageError, match=r"shard_00001\.parquet has changed since"):
        one_pass(reader, 0, 1)
    paths[1].unlink()
    with pytest.raises(NotFound, match=r"shard_00001\.parquet does not exist"):
        one_pass(reader, 0, 1)


def test_a_damaged_row_group_is_named(tmp_path):
    write_shards(numbered(3000), tmp_path / "corpus", rows_per_shard=3000, val_texts=["v"])
    path = split_shards(tmp_path / "corpus", "train")[0]
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[start + 40 : start + 400] = bytes(360)
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"row group 1 of shard .*shard_00000\.parquet is corrupt"):
        list(iter_documents(tmp_path / "corpus", "train"))


def test_stream_continues_from_any_position_and_starts_over(tmp_path):
    write_shards(numbered(3000), tmp_path / "corpus", rows_per_shard=1500, val_texts=["v"])
    reader = ShardReader(split_shards(tmp_path / "corpus", "train"))
    stream = make_stream(reader, 1, 2)
    places, texts = zip(
        *itertools.chain.from_iterable(next_batch(stream) for _ in range(30)), strict=True
    )
    assert places[-1].epoch == 3
    start_over = [place.epoch for place in places].index(1)
    assert texts[start_over:] == texts[: len(texts) - start_over]
    for i in range(0, len(places), 97):
        again = make_stream(reader, 1, 2)
        again.seek(places[i])
        batch = next_batch(again)
        expected = list(zip(places[i:], texts[i:], strict=True))[: len(batch)]
        assert batch[: len(expected)] == expected
        assert decode(again.load(list(places[i : i + 1]))) == [texts[i]]

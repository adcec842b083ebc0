"""Batches are equal on any number of processes and continue exactly from any state."""

import json
import os
import socket
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_packing import pack_by_hand

from nanochat_jax.data.loader import Loader, merge_states, pretraining_loader
from nanochat_jax.data.shards import iter_documents, write_shards
from nanochat_jax.errors import UsageError
from nanochat_jax.tokenizer import Tokenizer

T = 48
PACKINGS = ("bestfit", "stream")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer({bytes([byte]): byte for byte in range(256)})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 120)))) for _ in range(1500)]
    directory = tmp_path_factory.mktemp("data") / "corpus"
    write_shards(texts[:1300], directory, rows_per_shard=500, val_texts=texts[1300:])
    return directory


def make(corpus, tokenizer, start_state=None, **options):
    loader = pretraining_loader(
        corpus,
        tokenizer,
        **{"split": "train", "batch_size": 8, "sequence_len": T, "buffer_docs": 64, **options},
    )
    if start_state:
        loader.set_state(start_state)
    return loader


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() == {"inputs", "targets"}
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize("packing", PACKINGS)
def test_targets_are_the_tokens_after_the_inputs(corpus, tokenizer, packing):
    for batch in take(make(corpus, tokenizer, packing=packing), 20):
        assert batch["inputs"].shape == batch["targets"].shape == (8, T)
        assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        if packing == "bestfit":
            assert (batch["inputs"][:, 0] == tokenizer.bos_id).all()


def test_one_virtual_shard_streams_the_corpus_in_file_order(corpus, tokenizer):
    encoded = tokenizer.encode(list(iter_documents(corpus, "train")), prepend=tokenizer.bos_id)
    whole = np.concatenate(encoded + encoded)
    loader = make(corpus, tokenizer, packing="stream", num_shards=1)
    for step in range(1 + sum(map(len, encoded)) // (8 * T + 1)):
        start = step * (8 * T + 1)
        np.testing.assert_array_equal(next(loader)["inputs"].ravel(), whole[start : start + 8 * T])


def test_one_virtual_shard_is_best_fit_over_the_corpus_in_file_order(corpus, tokenizer):
    documents = tokenizer.encode(list(iter_documents(corpus, "train")), prepend=tokenizer.bos_id)
    row_groups = [documents[start : start + 500] for start in range(0, len(documents), 500)]
    batches = (
        [(None, np.array(ids)) for ids in group[i : i + 128]]
        for group in row_groups
        for i in range(0, 500, 128)
    )
    expected = pack_by_hand(batches, 64, T + 1, 800)
    found = take(make(corpus, tokenizer, num_shards=1), 100)
    np.testing.assert_array_equal(
        np.concatenate([batch["inputs"] for batch in found]), expected[:, :-1]
    )


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(
    corpus, tokenizer, packing, process_count
):
    alone = take(make(corpus, tokenizer, packing=packing), 30)
    parts = [
        take(
            make(corpus, tokenizer, packing=packing, process_index=i, process_count=process_count),
            30,
        )
        for i in range(process_count)
    ]
    steps = zip(*parts, strict=True)
    together = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in steps
    ]
    assert_equal(alone, together)


@pytest.mark.parametrize("packing", PACKINGS)
def test_restored_state_continues_exactly_at_every_step(corpus, tokenizer, packing):
    loader = make(corpus, tokenizer, packing=packing)
    states, batches = [], []
    for _ in range(250):
        states.append(json.dumps(loader.get_state()))
        batches += take(loader, 1)
    assert min(shard["position"]["epoch"] for shard in loader.get_state()["shards"].values()) >= 1
    for step in (*range(0, 240, 23), 237, 238, 239):
        restored = make(corpus, tokenizer, packing=packing, start_state=json.loads(states[step]))
        assert restored.get_state() == json.loads(states[step])
        assert_equal(batches[step : step + 5], take(restored, 5))
        assert restored.get_state() == json.loads(states[step + 5])


@pytest.mark.parametrize("packing", PACKINGS)
def test_state_of_two_processes_restores_on_one_and_on_four(corpus, tokenizer, packing):
    alone = take(make(corpus, tokenizer, packing=packing), 20)
    pair = [
        make(corpus, tokenizer, packing=packing, process_index=i, process_count=2) for i in range(2)
    ]
    for loader in pair:
        take(loader, 7)
    state = json.loads(json.dumps(merge_states([loader.get_state() for loader in pair])))
    assert_equal(alone[7:], take(make(corpus, tokenizer, packing=packing, start_state=state), 13))
    quarter = make(
        corpus, tokenizer, packing=packing, start_state=state, process_index=2, process_count=4
    )
    assert_equal(
        [{name: array[4:6] for name, array in batch.items()} for batch in alone[7:]],
        take(quarter, 13),
    )


PROCESS = """
import json, sys
import jax
import numpy as np
index, port, corpus = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
from nanochat_jax.data.loader import pretraining_loader
from nanochat_jax.model.sharding import global_batch, make_mesh
from nanochat_jax.tokenizer import Tokenizer
tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})
loader = pretraining_loader(corpus, tokenizer, split="train", batch_size=8, sequence_len=48,
                            buffer_docs=64, process_index=index, process_count=2)
mesh = make_mesh("auto")
for _ in range(5):
    rows = global_batch(mesh, next(loader)["inputs"][None], batch_axis=1)
mine = {shard.index[1].start: np.asarray(shard.data).tolist() for shard in rows.addressable_shards}
print(json.dumps([loader.get_state(), mine]))
loader.close()
"""


def test_two_processes_make_one_global_array_and_one_position(corpus, tokenizer):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), str(port), str(corpus)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in pair]
    (state, first), (other_state, second) = (
        json.loads(output.splitlines()[-1]) for output in outputs
    )
    loader = make(corpus, tokenizer)
    batch = take(loader, 5)[-1]
    assert merge_states([other_state, state]) == json.loads(json.dumps(loader.get_state()))
    assert (sorted(first), sorted(second)) == (["0", "1", "2", "3"], ["4", "5", "6", "7"])
    for row, data in (first | second).items():
        np.testing.assert_array_equal(data, batch["inputs"][None, int(row) : int(row) + 1])


def test_merging_incomplete_or_repeated_states_is_refused(corpus, tokenizer):
    state = make(corpus, tokenizer, process_index=1, process_count=2).get_state()
    with pytest.raises(ValueError, match="4 of 8 virtual shards"):
        merge_states([state])
    with pytest.raises(ValueError, match="occur in two states"):
        merge_states([state, state])
    with pytest.raises(ValueError, match="different runs or steps: they differ in packing"):
        merge_states([state, state | {"packing": "stream"}])
    with pytest.raises(UsageError, match="lacks virtual shard 0 of 8"):
        make(corpus, tokenizer, start_state=state)
    with pytest.raises(UsageError, match="packing bestfit, this run stream"):
        make(corpus, tokenizer, packing="stream", start_state=make(corpus, tokenizer).get_state())


def test_reset_starts_over(corpus, tokenizer):
    loader = make(corpus, tokenizer, split="val")
    first = take(loader, 5)
    loader.reset()
    assert_equal(first, take(loader, 5))


def test_splits_share_no_document(tmp_path, tokenizer):
    write_shards(["train"] * 100, tmp_path / "corpus", rows_per_shard=50, val_texts=["val"] * 100)
    for split in ("train", "val"):
        tokens = np.unique(
            np.concatenate(
                [
                    batch["inputs"]
                    for batch in take(make(tmp_path / "corpus", tokenizer, split=split), 5)
                ]
            )
        )
        assert set(tokens.tolist()) == {*split.encode(), tokenizer.bos_id}


def test_more_shards_on_disk_do_not_move_the_position(tmp_path, tokenizer):
    texts = [f"document number {i}" for i in range(4000)]
    write_shards(texts, tmp_path / "corpus", rows_per_shard=1000, val_texts=["val"])
    later, val = (
        tmp_path / "corpus" / "shard_00003.parquet",
        tmp_path / "corpus" / "shard_00004.parquet",
    )
    val.rename(tmp_path / "corpus" / "shard_00009.parquet")
    kept = later.read_bytes()
    later.unlink()
    loader = make(tmp_path / "corpus", tokenizer)
    take(loader, 10)
    state, batches = loader.get_state(), take(loader, 5)
    later.write_bytes(kept)
    assert_equal(batches, take(make(tmp_path / "corpus", tokenizer, start_state=state), 5))
    first = tmp_path / "corpus" / "shard_00000.parquet"
    first.rename(tmp_path / "kept")
    with pytest.raises(UsageError, match=r"needs shard_00000\.parquet, which no longer exists"):
        make(tmp_path / "corpus", tokenizer, start_state=state)
    later.rename(first)
    with pytest.raises(UsageError, match=r"shard_00000\.parquet had [0-9,]+ bytes .*, now it has"):
        make(tmp_path / "corpus", tokenizer, start_state=state)


def test_too_little_text_is_an_error_not_a_hang(tmp_path, tokenizer):
    write_shards(["a"] * 3, tmp_path / "corpus", rows_per_shard=50, val_texts=["v"])
    with pytest.raises(UsageError, match="virtual shard 3 of 8 finds no document"):
        make(tmp_path / "corpus", tokenizer)
    assert next(make(tmp_path / "corpus", tokenizer, num_shards=1))["inputs"].shape == (8, T)


def test_an_error_in_the_background_reaches_the_caller(tmp_path, tokenizer):
    write_shards(["a" * 100] * 3000, tmp_path / "corpus", rows_per_shard=1000, val_texts=["v"])
    pq.write_table(pa.table({"other": ["a"]}), tmp_path / "corpus" / "shard_00001.parquet")
    with pytest.raises(UsageError, match=r"shard_00001\.parquet has no column 'text'"):
        take(make(tmp_path / "corpus", tokenizer), 2000)


def test_text_that_is_not_utf8_is_named(tmp_path, tokenizer):
    write_shards(["a" * 100] * 300, tmp_path / "corpus", rows_per_shard=100, val_texts=["v"])
    broken = pa.StringArray.from_buffers(
        1, pa.py_buffer(np.array([0, 3], np.int32)), pa.py_buffer(b"a\xff\xfe")
    )
    pq.write_table(pa.table({"text": broken}), tmp_path / "corpus" / "shard_00001.parquet")
    with pytest.raises(
        UsageError, match=r"row group 0 of shard .*shard_00001\.parquet cannot be encoded"
    ):
        take(make(tmp_path / "corpus", tokenizer, num_shards=1, buffer_docs=10), 2000)


def test_batches_that_cannot_be_shared_out_are_refused(corpus, tokenizer):
    with pytest.raises(
        UsageError,
        match="2 virtual shards must divide the batch of 6 rows and be a multiple of the 3",
    ):
        make(corpus, tokenizer, batch_size=6, process_count=3)
    with pytest.raises(UsageError, match="unknown packing 'padded'"):
        make(corpus, tokenizer, packing="padded")


def test_background_thread_ends_with_the_loader(corpus, tokenizer):
    before = threading.active_count()
    loader = make(corpus, tokenizer)
    next(loader)
    assert isinstance(loader, Loader) and threading.active_count() == before + 1
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    assert threading.active_count() == before


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_position_is_that_of_the_last_batch_handed_out(corpus, tokenizer, packing):
    loader = make(corpus, tokenizer, packing=packing)
    for _ in range(20):
        take(loader, 1)
        assert (
            loader.position == loader.get_state()["shards"]["0"]["position"] or packing == "stream"
        )
    assert loader.position["epoch"] == 0 and loader.position["file"].endswith(".parquet")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("texts", [[], [None, None], ["", ""]])
def test_a_split_without_text_is_refused_before_anything_is_trained(
    tmp_path, tokenizer, split, texts
):
    for name, held in (("shard_00000", split == "train"), ("shard_00001", split == "val")):
        column = pa.array(texts if held else ["a text"] * 50, pa.string())
        pq.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
    with pytest.raises(
        UsageError, match="no document for (training|validation) in .* has any text"
    ):
        make(tmp_path, tokenizer, split=split, num_shards=1)

"""Downloads from a server of the tests: whole shards arrive, torn ones never do."""

import os
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from nanochat_jax import dataset
from nanochat_jax.data.needs import Size, enough_for, measure
from nanochat_jax.dataset import HUB_CORPORA

REPO = HUB_CORPORA["climbmix"].repo


@pytest.fixture
def hub(hub, tmp_path):
    for repo, indices in (("climbmix", (*range(7), 6542)), ("fineweb", (*range(2), 1822))):
        for index in indices:
            texts = [f"document {i} of shard {index}" for i in range(500)]
            pq.write_table(pa.table({"text": texts}), tmp_path / "shard.parquet")
            content = (tmp_path / "shard.parquet").read_bytes()
            hub.add(HUB_CORPORA[repo].repo, f"shard_{index:05d}.parquet", content)
    return hub


@pytest.fixture
def files(hub):
    return hub.repos[REPO, "main"]


NAMES = [f"shard_{index:05d}.parquet" for index in range(7)]
VAL = "shard_06542.parquet"


def download(names, tmp_path):
    """Failures that `download` reports, and the shards it leaves."""
    failed = dataset.download(REPO, names, tmp_path / "shards", num_workers=2)
    left = [path for path in (tmp_path / "shards").iterdir() if path.is_file()]
    return failed, {path.name: path.read_bytes() for path in left}


# The same in a process of its own, with what comes first in {first}.
PROCESS = """
import json, sys
from pathlib import Path
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 500
from nanochat_jax.dataset import download
print(json.dumps(download(sys.argv[1], sys.argv[3:], Path(sys.argv[2]), num_workers=2)))
"""


def start(names, hub, tmp_path, first=""):
    arguments = [sys.executable, "-c", first + PROCESS, REPO, str(tmp_path / "shards"), *names]
    env = os.environ | hub.environment(tmp_path)
    return subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, text=True)


def test_download_adds_the_pinned_validation_shard(hub, files, tmp_path, command):
    code, _, err = command("-n", "2", "-w", "3")
    assert code == 0, err
    directory = tmp_path / "base" / "base_data_climbmix"
    names = [*NAMES[:2], VAL]
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        name: files[name] for name in names
    }
    assert "Bearer hf_secret" in hub.tokens["hub"] and hub.tokens["cdn"] == {None}
    assert [request for request in hub.requests if request.startswith("GET /cdn")][0].endswith(VAL)

    (directory / names[0]).write_bytes(files[names[0]][:-100])  # torn by whatever else wrote it
    hub.requests.clear()
    code, _, err = command("-n", "3")
    assert code == 0 and "2 of 4 shards are already in" in err
    assert sorted(path.name for path in directory.iterdir()) == [*NAMES[:3], VAL]
    assert (directory / names[0]).read_bytes() == files[names[0]]
    assert not any(name in request for request in hub.requests for name in names[1:])

    rows = [line.split() for line in command("info")[1].splitlines()[1:3]]
    assert [row[:5] for row in rows] == [
        ["train", "3", "shards", "1,500", "documents"],
        ["val", "1", "shards", "500", "documents"],
    ]


def test_failed_shards_are_listed_and_the_exit_code_is_one(hub, tmp_path, command):
    del hub.repos[HUB_CORPORA["fineweb"].repo, "main"]["shard_00001.parquet"]
    code, out, err = command("-n", "2", "--dataset", "fineweb")
    assert code == 1 and "2 of 3 shards of fineweb are in" in out
    assert "\nfailed: shard_00001.parquet: " in err and "Traceback" not in err
    left = sorted(path.name for path in (tmp_path / "base" / "base_data").glob("*.parquet"))
    assert left == ["shard_00000.parquet", "shard_01822.parquet"]


def test_without_the_validation_shard_there_is_no_corpus(hub, files, tmp_path):
    """A training shard alone would be taken for validation."""
    del files[VAL]
    failed, left = download([NAMES[0], VAL], tmp_path)
    assert set(failed) == {NAMES[0], VAL} and not left
    assert not hub.asked("GET /cdn")


def test_temporary_faults_are_overcome(hub, files, tmp_path):
    names = NAMES[:4]
    faults = zip([*names, VAL], ["torn", "busy", "flip", "slow", "no range"], strict=True)
    hub.faults |= dict(faults)
    failed, left = download([*names, VAL], tmp_path)
    assert failed == {}
    assert left == {name: files[name] for name in [*names, VAL]}
    # A torn transfer continues where it broke; one whose bytes were wrong starts over.
    assert names[0] in dict(hub.ranges)
    assert names[2] not in {name for name, _ in hub.ranges}


def test_the_next_run_continues_a_partial_file(hub, files, tmp_path):
    download([VAL], tmp_path)
    hub.faults[NAMES[0]] = "gone"
    failed, left = download([NAMES[0], VAL], tmp_path)
    assert set(failed) == {NAMES[0]} and set(left) == {VAL}
    hub.faults.clear()
    hub.ranges.clear()
    failed, left = download([NAMES[0], VAL], tmp_path)
    assert failed == {} and left == {name: files[name] for name in (NAMES[0], VAL)}
    assert [request for request, _ in hub.ranges] == [NAMES[0]] and hub.ranges[0][1] > 1000
    assert [path.name for path in (tmp_path / "shards").iterdir() if path.is_dir()] == []


def test_a_killed_run_leaves_no_shard_and_the_next_continues(hub, files, tmp_path):
    download([VAL], tmp_path)
    hub.faults[NAMES[0]] = "slow"
    process = start([NAMES[0], VAL], hub, tmp_path)
    partial = tmp_path / "shards" / ".download"
    deadline = time.monotonic() + 60
    while (
        not any(path.stat().st_size for path in partial.glob("*.part"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "shards" / NAMES[0]).exists()
    hub.faults.clear()
    failed, left = download([NAMES[0], VAL], tmp_path)
    assert failed == {} and left == {name: files[name] for name in (NAMES[0], VAL)}
    assert hub.ranges and hub.ranges[0][0] == NAMES[0]


def test_what_is_not_a_complete_shard_never_gets_its_name(hub, files, tmp_path):
    whole = files[NAMES[0]]
    # announced so: size and checksum are right, the footer missing
    hub.add(REPO, NAMES[1], whole[: len(whole) // 2])
    for name, table in ((NAMES[2], {"content": ["a"]}), (NAMES[4], {"text": [1, 2]})):
        pq.write_table(pa.table(table), tmp_path / "other.parquet")
        hub.add(REPO, name, (tmp_path / "other.parquet").read_bytes())
    faults = {0: "short", 3: "gated", 5: "long", 6: "error"}
    hub.faults |= {NAMES[index]: fault for index, fault in faults.items()}
    failed, left = download([*NAMES, VAL], tmp_path)
    assert set(left) == {VAL}
    assert set(failed) == set(NAMES)
    for index, message in {
        0: "should be of size",
        1: "not a readable parquet file",
        2: "has no column 'text'",
        4: "holds int64, expected string",
        5: "should be of size",
        6: "500",
    }.items():
        assert message in failed[NAMES[index]]
    # a retry only where it may help
    for index, requests in {1: 1, 3: 0, 6: 5}.items():
        assert hub.asked(f"GET /cdn/{REPO}/main/{NAMES[index]}") == requests


def test_two_downloads_at_once_share_the_work(hub, files, tmp_path):
    names = [*NAMES[:2], VAL]
    hub.faults |= dict.fromkeys(names, "slow")
    process = start(names, hub, tmp_path)
    assert download(names, tmp_path)[0] == {}
    assert process.communicate()[0] == "{}\n"
    assert {path.name: path.read_bytes() for path in (tmp_path / "shards").glob("*.parquet")} == {
        name: files[name] for name in names
    }


def test_offline_mode_uses_only_the_local_cache(hub, files, tmp_path, monkeypatch):
    folder = tmp_path / "hf" / "hub" / ("datasets--" + REPO.replace("/", "--"))
    commit = hub.commit(REPO)
    for path, content in (
        (folder / "refs" / "main", commit.encode()),
        (folder / "snapshots" / commit / VAL, files[VAL]),
    ):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failed, left = download([NAMES[1], VAL], tmp_path)
    assert set(failed) == {NAMES[1]} and left == {VAL: files[VAL]}
    assert not hub.requests


def test_measured_size_is_that_of_the_text(tmp_path):
    texts = ["é" * i for i in range(3000)]
    pq.write_table(
        pa.table({"text": texts}),
        tmp_path / "shard_0.parquet",
        compression="zstd",
        use_dictionary=False,
    )
    size = measure([tmp_path / "shard_0.parquet"])
    assert size.documents == 3000
    assert size.text_bytes == pytest.approx(sum(len(text.encode()) for text in texts), rel=0.01)


def test_a_corpus_is_enough_for_the_depths_that_read_it_a_few_times():
    tiny, some = (enough_for("custom", Size(2, int(size)))[1] for size in (5e5, 4e8))
    assert tiny.startswith("base_train: too small a corpus; d4 needs ") and " times" not in tiny
    assert tiny.endswith(" GB of text") and some.startswith(
        "base_train: any depth, with repetitions; d4 reads it "
    )

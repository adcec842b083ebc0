"""Downloads from a server on this machine that speaks the Hub's protocol: whole shards arrive,
torn ones never do.
"""

import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer

from nanochat_jax import dataset
from nanochat_jax.data.needs import Size, enough_for, measure
from nanochat_jax.dataset import HUB_CORPORA

REPO = HUB_CORPORA["climbmix"].repo


@pytest.fixture
def hub(tmp_path):
    with HubServer() as server:
        for repo, indices in (("climbmix", (*range(4), 6542)), ("fineweb", (*range(2), 1822))):
            for index in indices:
                path = tmp_path / "shard.parquet"
                pq.write_table(
                    pa.table({"text": [f"document {i} of shard {index}" for i in range(500)]}), path
                )
                server.add(HUB_CORPORA[repo].repo, f"shard_{index:05d}.parquet", path.read_bytes())
        yield server


@pytest.fixture
def files(hub):
    return hub.repos[REPO, "main"]


def run(arguments, hub, tmp_path, **environment):
    env = os.environ | hub.environment(tmp_path) | environment
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120
    )


def command(arguments, hub, tmp_path, **environment):
    return run(["-m", "nanochat_jax.dataset", *arguments], hub, tmp_path, **environment)


DOWNLOAD = """
import json, sys, time
from pathlib import Path
import huggingface_hub.constants
time.sleep = lambda seconds: None  # what the client does before it asks again
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 500  # what is written at once; the shards here are small
from nanochat_jax.dataset import HUB_CORPORA, download
repo = HUB_CORPORA["climbmix"].repo
print(json.dumps(download(repo, sys.argv[2:], Path(sys.argv[1]), num_workers=2, wait_s=0.01)))
"""
VAL = "shard_06542.parquet"


def download(names, hub, tmp_path, **environment):
    """Failures that `download` reports, and the files it leaves, hidden ones included."""
    result = run(["-c", DOWNLOAD, str(tmp_path / "shards"), *names], hub, tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    left = (tmp_path / "shards").iterdir()
    return json.loads(result.stdout), {
        path.name: path.read_bytes() for path in left if path.is_file()
    }


def test_download_adds_the_pinned_validation_shard(hub, files, tmp_path):
    result = command(["-n", "2", "-w", "3"], hub, tmp_path)
    assert result.returncode == 0, result.stderr
    directory = tmp_path / "base" / "base_data_climbmix"
    names = ["shard_00000.parquet", "shard_00001.parquet", VAL]
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        name: files[name] for name in names
    }
    assert "Bearer hf_secret" in hub.tokens["hub"] and hub.tokens["cdn"] == {None}
    assert [request for request in hub.requests if request.startswith("GET /cdn")][0].endswith(VAL)

    (directory / names[0]).write_bytes(files[names[0]][:-100])  # torn by whatever else wrote it
    hub.requests.clear()
    result = command(["-n", "3"], hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 of 4 shards are in" in result.stderr
    assert sorted(path.name for path in directory.iterdir()) == [
        *names[:2],
        "shard_00002.parquet",
        VAL,
    ]
    assert (directory / names[0]).read_bytes() == files[names[0]]
    assert not any(name in request for request in hub.requests for name in names[1:])

    result = command(["info"], hub, tmp_path)
    rows = [line.split() for line in result.stdout.splitlines()[1:3]]
    assert [row[:5] for row in rows] == [
        ["train", "3", "shards", "1,500", "documents"],
        ["val", "1", "shards", "500", "documents"],
    ]


def test_failed_shards_are_listed_and_the_exit_code_is_one(hub, tmp_path):
    del hub.repos[HUB_CORPORA["fineweb"].repo, "main"]["shard_00001.parquet"]
    result = command(["-n", "2", "--dataset", "fineweb"], hub, tmp_path)
    assert result.returncode == 1
    assert "2 of 3 shards of fineweb are in" in result.stdout
    assert [line for line in result.stderr.splitlines() if line.startswith("failed: ")][
        0
    ].startswith("failed: shard_00001.parquet: ")
    assert "Traceback" not in result.stderr
    left = sorted(path.name for path in (tmp_path / "base" / "base_data").glob("*.parquet"))
    assert left == ["shard_00000.parquet", "shard_01822.parquet"]


def test_without_the_validation_shard_there_is_no_corpus(hub, files, tmp_path):
    """A training shard that lies alone on the disk would be taken for validation."""
    del files[VAL]
    failed, left = download(["shard_00000.parquet", VAL], hub, tmp_path)
    assert set(failed) == {"shard_00000.parquet", VAL} and not left
    assert not hub.asked("GET /cdn")


def test_passing_faults_are_overcome(hub, files, tmp_path):
    faults = ["torn", "busy", "flip", "slow"]
    names = [f"shard_{index:05d}.parquet" for index in range(len(faults))]
    hub.faults |= dict(zip(names, faults, strict=True)) | {VAL: "no range"}
    failed, left = download([*names, VAL], hub, tmp_path)
    assert failed == {}
    assert left == {name: files[name] for name in [*names, VAL]}
    # A torn transfer goes on where it broke; one whose bytes were wrong starts over.
    assert names[0] in dict(hub.ranges)
    assert names[2] not in {name for name, _ in hub.ranges}


def test_the_next_run_goes_on_with_a_partial_file(hub, files, tmp_path):
    name = "shard_00000.parquet"
    download([VAL], hub, tmp_path)
    hub.faults[name] = "gone"
    failed, left = download([name, VAL], hub, tmp_path)
    assert set(failed) == {name} and set(left) == {VAL}
    hub.faults.clear()
    hub.ranges.clear()
    failed, left = download([name, VAL], hub, tmp_path)
    assert failed == {} and left == {key: files[key] for key in (name, VAL)}
    assert [request for request, _ in hub.ranges] == [name] and hub.ranges[0][1] > 1000
    assert [path.name for path in (tmp_path / "shards").iterdir() if path.is_dir()] == []


def test_a_killed_run_leaves_no_shard_and_the_next_goes_on(hub, files, tmp_path):
    name = "shard_00000.parquet"
    download([VAL], hub, tmp_path)
    hub.faults[name] = "slow"
    env = os.environ | hub.environment(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD, str(tmp_path / "shards"), name, VAL], env=env
    )
    partial = tmp_path / "shards" / ".download"
    deadline = time.monotonic() + 60
    while (
        not any(path.stat().st_size for path in partial.glob("*.part"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "shards" / name).exists()
    hub.faults.clear()
    failed, left = download([name, VAL], hub, tmp_path)
    assert failed == {} and left == {key: files[key] for key in (name, VAL)}
    assert hub.ranges and hub.ranges[0][0] == name


def test_what_is_not_a_whole_shard_never_gets_its_name(hub, files, tmp_path):
    names = [f"shard_{index:05d}.parquet" for index in range(7)]
    whole = files[names[0]]
    # announced so: size and checksum are right, the footer missing
    hub.add(REPO, names[1], whole[: len(whole) // 2])
    for name, table in ((names[2], {"content": ["a"]}), (names[4], {"text": [1, 2]})):
        pq.write_table(pa.table(table), tmp_path / "other.parquet")
        hub.add(REPO, name, (tmp_path / "other.parquet").read_bytes())
    hub.add(REPO, names[5], whole)
    hub.add(REPO, names[6], whole)
    hub.faults |= {names[0]: "short", names[3]: "gated", names[5]: "long", names[6]: "error"}
    failed, left = download([*names, VAL], hub, tmp_path)
    assert set(left) == {VAL}
    assert set(failed) == set(names)
    for name, message in (
        (names[0], "should be of size"),
        (names[1], "not a readable parquet file"),
        (names[2], "has no column 'text'"),
        (names[4], "holds int64, expected string"),
        (names[5], "should be of size"),
        (names[6], "500"),
    ):
        assert message in failed[name]
    assert hub.asked(f"GET /cdn/{REPO}/main/{names[1]}") == 1  # asking again would give the same
    assert hub.asked(f"GET /cdn/{REPO}/main/{names[3]}") == 0
    assert hub.asked(f"GET /cdn/{REPO}/main/{names[6]}") == 5


def test_two_downloads_at_once_share_the_work(hub, files, tmp_path):
    names = ["shard_00000.parquet", "shard_00001.parquet", VAL]
    hub.faults |= dict.fromkeys(names, "slow")
    env = os.environ | hub.environment(tmp_path)
    arguments = [sys.executable, "-c", DOWNLOAD, str(tmp_path / "shards"), *names]
    pair = [
        subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate()[0] for process in pair] == ["{}\n", "{}\n"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "shards").glob("*.parquet")} == {
        name: files[name] for name in names
    }


def test_offline_mode_uses_the_local_cache_alone(hub, files, tmp_path):
    folder = tmp_path / "hf" / "hub" / ("datasets--" + REPO.replace("/", "--"))
    commit = hub.commit(REPO)
    for path, text in (
        (folder / "refs" / "main", commit.encode()),
        (folder / "snapshots" / commit / VAL, files[VAL]),
    ):
        path.parent.mkdir(parents=True)
        path.write_bytes(text)
    failed, left = download(["shard_00001.parquet", VAL], hub, tmp_path, HF_HUB_OFFLINE="1")
    assert set(failed) == {"shard_00001.parquet"}
    assert left == {VAL: files[VAL]}
    assert not hub.requests


def test_a_full_disk_is_named_at_once(hub, tmp_path):
    full = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    )
    result = run(["-c", full + DOWNLOAD, str(tmp_path / "shards"), VAL], hub, tmp_path)
    assert "File too large" in json.loads(result.stdout)[VAL]
    assert not list((tmp_path / "shards").glob("*.parquet")) and hub.asked("GET /cdn") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "--num-shards must be at least 1, or -1, got 0"),
        (["-n", "2000", "--dataset", "fineweb"], "expected 1 to 1822"),
        (["-n", "2", "-w", "0"], "--num-workers must be at least 1, got 0"),
        (["everything"], "no command 'everything'"),
        (["info"], "no parquet shards under"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["dataset.py", *arguments])
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as exit:
        dataset.main()
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_all_shards_are_the_training_shards_and_one():
    names = HUB_CORPORA["climbmix"].names(-1)
    assert (len(names), len(set(names)), names[0], names[-1]) == (
        6543,
        6543,
        "shard_00000.parquet",
        "shard_06542.parquet",
    )


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
    """One that is far too small is told how much text there should be, and no large number of
    times.
    """
    tiny, some = (enough_for("custom", Size(2, int(size)))[1] for size in (5e5, 4e8))
    assert tiny.startswith("base_train: too small a corpus; d4 wants ") and " times" not in tiny
    assert tiny.endswith(" GB of text") and some.startswith(
        "base_train: any depth, with repetitions; d4 reads it "
    )

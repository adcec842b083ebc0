"""Any data set of the Hub becomes a corpus: the right files of the right split, from a server with
its protocol.
"""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer

from nanochat_jax.data.hub_dataset import Listing, glob_pattern, select_files
from nanochat_jax.data.shards import iter_documents
from nanochat_jax.errors import NotFound, UsageError

REPO = "owner/texts"


def listing(*names, configs=()):
    return Listing(REPO, "commit", tuple(sorted(names)), tuple(configs))


@pytest.mark.parametrize(
    ("names", "subset", "split", "expected"),
    [
        (["README.md", "b.parquet", "a.parquet"], None, "train", ["a.parquet", "b.parquet"]),
        (["b.parquet"], None, "test", []),
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            None,
            "train",
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
        (["train/x.jsonl", "dev/x.jsonl", "strain.jsonl"], None, "validation", ["dev/x.jsonl"]),
        (["train/x.jsonl", "dev/x.jsonl", "strain.jsonl"], None, "train", ["train/x.jsonl"]),
        (["en/train.csv", "de/train.csv", "en/test.csv"], "de", "train", ["de/train.csv"]),
        (["en/train.csv"], "fr", "train", []),
        (["train.parquet", "train.jsonl.gz", "train.csv"], None, "train", ["train.parquet"]),
        (["train.arrow", "train.zip"], None, "train", []),
        (["books/part.jsonl.zst"], None, "books", ["books/part.jsonl.zst"]),
    ],
)
def test_names_decide_where_the_card_says_nothing(names, subset, split, expected):
    assert select_files(listing(*names), subset, split) == expected


CONFIGS = (
    {
        "config_name": "en",
        "data_files": [
            {"split": "train", "path": "english/*.parquet"},
            {"split": "test", "path": ["held/one.parquet", "held/**/two.parquet"]},
        ],
    },
    {"config_name": "de", "default": True, "data_files": "german/**"},
    {"config_name": "fr", "data_dir": "french"},
)
NAMES = (
    "english/a.parquet",
    "english/deep/b.parquet",
    "held/one.parquet",
    "held/x/y/two.parquet",
    "german/x/c.parquet",
    "french/train.parquet",
    "french/test.parquet",
)


@pytest.mark.parametrize(
    ("subset", "split", "expected"),
    [
        ("en", "train", ["english/a.parquet"]),
        ("en", "test", ["held/one.parquet", "held/x/y/two.parquet"]),
        (None, "train", ["german/x/c.parquet"]),
        ("de", "test", []),
        ("fr", "train", ["french/train.parquet"]),
    ],
)
def test_the_card_decides(subset, split, expected):
    assert select_files(listing(*NAMES, configs=CONFIGS), subset, split) == expected


def test_an_unclear_subset_is_asked_for():
    with pytest.raises(UsageError, match="several subsets: choose one with --subset, of en, fr"):
        select_files(listing(*NAMES, configs=(CONFIGS[0], CONFIGS[2])), None, "train")
    with pytest.raises(NotFound, match="no subset 'es': there are en, de, fr"):
        select_files(listing(*NAMES, configs=CONFIGS), "es", "train")


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("data/train-*", "data/train-00000.parquet", True),
        ("data/*", "data/x/y", False),
        ("**/*.csv", "a.csv", True),
        ("**/*.csv", "x/y/a.csv", True),
        ("a?.csv", "ab.csv", True),
        ("a.csv", "aXcsv", False),
        ("./a.csv", "a.csv", True),
    ],
)
def test_patterns_are_those_of_paths(pattern, name, matches):
    assert bool(glob_pattern(pattern).fullmatch(name)) is matches


# --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def parquet(tmp_path, texts, column="text", row_group_size=None):
    pq.write_table(
        pa.table({"id": range(len(texts)), column: texts}),
        tmp_path / "x.parquet",
        row_group_size=row_group_size,
    )
    return (tmp_path / "x.parquet").read_bytes()


def numbered(count, start=0):
    return [f"document {i} of the data set, with some words" for i in range(start, start + count)]


def command(arguments, hub, tmp_path, **environment):
    env = os.environ | hub.environment(tmp_path) | environment
    return subprocess.run(
        [sys.executable, "-m", "nanochat_jax.dataset", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def corpus(tmp_path):
    directory = tmp_path / "base" / "base_data_custom"
    return [sorted(iter_documents(directory, split)) for split in ("train", "val")], json.loads(
        (directory / "manifest.json").read_text()
    )


def test_files_arrive_over_faults_and_become_one_corpus(hub, tmp_path):
    for index, fault in enumerate(("torn", "slow", "flip", None)):
        name = f"data/train-{index:05d}-of-00004.parquet"
        texts = [*numbered(700, 1000 * index), None, ""]
        hub.add(REPO, name, parquet(tmp_path, texts))
        if fault:
            hub.faults[name] = fault
    hub.add(REPO, "data/test-00000-of-00001.parquet", parquet(tmp_path, ["of the test split"] * 5))
    result = command(
        ["hf", "--dataset", REPO, "--rows-per-shard", "1500", "--val-fraction", "0.01"],
        hub,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert (
        "2,800 documents (28 for validation)" in result.stdout
        and "8 rows without text" in result.stdout
    )
    (train, val), manifest = corpus(tmp_path)
    assert sorted(train + val) == sorted(
        text for index in range(4) for text in numbered(700, 1000 * index)
    )
    source = manifest["sources"][0]["source"]
    assert (source["dataset"], source["revision"], source["split"]) == (
        REPO,
        hub.commit(REPO),
        "train",
    )
    assert {path.name for path in (tmp_path / "base").iterdir()} == {
        "base_data_custom",
        ".base_data_custom.lock",
    }

    hub.requests.clear()
    result = command(["hf", "--dataset", REPO], hub, tmp_path)
    assert result.returncode == 0 and "already" in result.stdout and not hub.asked("/cdn/")
    result = command(["hf", "--dataset", REPO, "--split", "test"], hub, tmp_path)
    assert (
        result.returncode == 2 and "--append adds to it" in result.stderr and not hub.asked("/cdn/")
    )
    assert corpus(tmp_path) == ([train, val], manifest)
    result = command(["hf", "--dataset", REPO, "--split", "test", "--append"], hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(corpus(tmp_path)[0][0]) == len(train) + 4


@pytest.mark.parametrize("kind", ["jsonl", "csv", "converted"])
def test_other_formats(hub, tmp_path, kind):
    texts = numbered(50)
    if kind == "jsonl":
        content = "".join(json.dumps({"body": text}) + "\n" for text in texts).encode()
        hub.add(REPO, "english/part.jsonl", content)
        hub.cards[REPO] = {
            "configs": [
                {"config_name": "en", "data_files": [{"split": "train", "path": "english/*"}]}
            ]
        }
    elif kind == "csv":
        hub.add(REPO, "en/all.csv", b"body\n" + "".join(f'"{text}"\n' for text in texts).encode())
    else:
        hub.add(REPO, "all.arrow", b"what only the Hub reads")
        hub.add(
            REPO,
            "en/train/0000.parquet",
            parquet(tmp_path, texts[:20], "body"),
            revision="refs/convert/parquet",
        )
        hub.add(
            REPO,
            "en/train/0001.parquet",
            parquet(tmp_path, texts[20:], "body"),
            revision="refs/convert/parquet",
        )
        hub.add(
            REPO,
            "en/test/0000.parquet",
            parquet(tmp_path, ["test"], "body"),
            revision="refs/convert/parquet",
        )
    result = command(
        ["hf", "--dataset", REPO, "--subset", "en", "--text-field", "body"], hub, tmp_path
    )
    assert result.returncode == 0, result.stderr
    (train, val), _ = corpus(tmp_path)
    assert sorted(train + val) == sorted(texts)


@pytest.mark.parametrize(
    ("preset", "repo"),
    [("k12", "CrowdMind/K-12Corpus"), ("opc", "CrowdMind/opc-annealing-corpus-synthetic")],
)
def test_presets_and_limits(hub, tmp_path, preset, repo):
    for index in range(3):
        hub.add(
            repo,
            f"data/train-{index:05d}-of-00003.parquet",
            parquet(tmp_path, numbered(100, 100 * index)),
        )
    arguments = [
        "hf",
        "--preset",
        preset,
        "--rows-per-shard",
        "500000",
        "--limit-rows",
        "150",
        "--val-fraction",
        "0.1",
    ]
    result = command(arguments, hub, tmp_path)
    assert result.returncode == 0, result.stderr
    (train, val), _ = corpus(tmp_path)
    assert sorted(train + val) == sorted(numbered(150)) and len(val) == 15
    assert not hub.asked("GET /cdn/" + repo + "/" + hub.commit(repo) + "/data/train-00002")


def test_a_large_row_group_is_read_piece_by_piece(hub, tmp_path):
    """The corpus has row groups of 1,024 whatever the source has."""
    hub.add(REPO, "train.parquet", parquet(tmp_path, numbered(5000), row_group_size=5000))
    assert command(["hf", "--dataset", REPO], hub, tmp_path).returncode == 0
    metadata = pq.ParquetFile(
        tmp_path / "base" / "base_data_custom" / "shard_00000.parquet"
    ).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [
        1024,
        1024,
        1024,
        1024,
        879,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset", "owner/other"],
            "data set owner/other is not to be had: RepositoryNotFoundError",
        ),
        (
            ["--dataset", REPO, "--split", "validation"],
            "data set owner/texts has no split 'validation'; it has train.parquet",
        ),
        (
            ["--dataset", REPO, "--text-field", "body"],
            "has no column 'body', only id, text: name the text with --text-field",
        ),
        (["--dataset", REPO, "--text-field", "id"], "column 'id' of"),
        (["--dataset", "owner/torn"], "is not a readable parquet file"),
        (["--dataset", "owner/empty"], "a corpus needs two"),
    ],
)
def test_mistakes_leave_nothing_and_are_one_line(hub, tmp_path, arguments, message):
    content = parquet(tmp_path, numbered(10))
    hub.add(REPO, "train.parquet", content)
    hub.add("owner/torn", "train.parquet", content[:-10])
    hub.add("owner/empty", "train.parquet", parquet(tmp_path, pa.array([], pa.string())))
    result = command(["hf", *arguments], hub, tmp_path)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.stderr
    assert {path.name for path in (tmp_path / "base").iterdir()} <= {".base_data_custom.lock"}


def test_a_file_that_does_not_come_is_named(hub, tmp_path):
    hub.add(REPO, "train-0.parquet", parquet(tmp_path, numbered(10)))
    hub.add(REPO, "train-1.parquet", parquet(tmp_path, numbered(10)))
    hub.faults["train-1.parquet"] = "gated"
    result = command(["hf", "--dataset", REPO], hub, tmp_path)
    assert (
        result.returncode == 2
        and "train-1.parquet of owner/texts could not be fetched: GatedRepoError" in result.stderr
    )
    assert not (tmp_path / "base" / "base_data_custom").exists()


def test_offline_mode_reads_the_local_cache(hub, tmp_path):
    folder = tmp_path / "hf" / "hub" / "datasets--owner--texts"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(hub.commit(REPO))
    (folder / "snapshots" / hub.commit(REPO)).mkdir(parents=True)
    (folder / "snapshots" / hub.commit(REPO) / "train.parquet").write_bytes(
        parquet(tmp_path, numbered(30))
    )
    result = command(["hf", "--dataset", REPO], hub, tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert sum(map(len, corpus(tmp_path)[0])) == 30 and not hub.requests
    result = command(["hf", "--dataset", "owner/other"], hub, tmp_path, HF_HUB_OFFLINE="1")
    assert (
        result.returncode == 2
        and "HF_HUB_OFFLINE is set, and it is not in the local cache" in result.stderr
    )

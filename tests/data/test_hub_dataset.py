"""Any data set of the Hub becomes a corpus: the right files of the right split."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from nanochat_jax import dataset
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


def parquet(tmp_path, texts, column="text", row_group_size=None):
    pq.write_table(
        pa.table({"id": range(len(texts)), column: texts}),
        tmp_path / "x.parquet",
        row_group_size=row_group_size,
    )
    return (tmp_path / "x.parquet").read_bytes()


def numbered(count, start=0):
    return [f"document {i} of the data set, with some words" for i in range(start, start + count)]


def corpus(tmp_path):
    directory = tmp_path / "base" / "base_data_custom"
    return [sorted(iter_documents(directory, split)) for split in ("train", "val")], json.loads(
        (directory / "manifest.json").read_text()
    )


def test_files_arrive_over_faults_and_become_one_corpus(hub, tmp_path, command):
    for index, fault in enumerate(("torn", "slow", "flip", None)):
        name = f"data/train-{index:05d}-of-00004.parquet"
        texts = [*numbered(700, 1000 * index), None, ""]
        hub.add(REPO, name, parquet(tmp_path, texts))
        if fault:
            hub.faults[name] = fault
    hub.add(REPO, "data/test-00000-of-00001.parquet", parquet(tmp_path, ["of the test split"] * 5))
    options = ("--rows-per-shard", "1500", "--val-fraction", "0.01")
    code, out, err = command("hf", "--dataset", REPO, *options)
    assert code == 0, err
    assert "2,800 documents (28 for validation)" in out and "8 rows without text" in out
    (train, val), manifest = corpus(tmp_path)
    assert sorted(train + val) == sorted(
        text for index in range(4) for text in numbered(700, 1000 * index)
    )
    source = manifest["sources"][0]["source"]
    assert source["dataset"] == REPO and source["revision"] == hub.commit(REPO)
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert names == {"base_data_custom", ".base_data_custom.lock"}

    hub.requests.clear()
    code, out, _ = command("hf", "--dataset", REPO)
    assert code == 0 and "is already in" in out and not hub.asked("/cdn/")
    code, _, err = command("hf", "--dataset", REPO, "--split", "test")
    assert code == 2 and "set --append to add to it" in err and not hub.asked("/cdn/")
    assert corpus(tmp_path) == ([train, val], manifest)
    code, _, err = command("hf", "--dataset", REPO, "--split", "test", "--append")
    assert code == 0, err
    assert len(corpus(tmp_path)[0][0]) == len(train) + 4


@pytest.mark.parametrize("source", ["jsonl", "csv", "converted"])
def test_other_formats(hub, tmp_path, command, source):
    texts = numbered(50)
    if source == "jsonl":
        content = "".join(json.dumps({"body": text}) + "\n" for text in texts).encode()
        hub.add(REPO, "english/part.jsonl", content)
        files = [{"split": "train", "path": "english/*"}]
        hub.cards[REPO] = {"configs": [{"config_name": "en", "data_files": files}]}
    elif source == "csv":
        hub.add(REPO, "en/all.csv", b"body\n" + "".join(f'"{text}"\n' for text in texts).encode())
    else:
        hub.add(REPO, "all.arrow", b"what only the Hub reads")
        for name, part in (
            ("train/0000", texts[:20]),
            ("train/0001", texts[20:]),
            ("test/0000", ["test"]),
        ):
            content = parquet(tmp_path, part, "body")
            hub.add(REPO, f"en/{name}.parquet", content, revision="refs/convert/parquet")
    code, _, err = command("hf", "--dataset", REPO, "--subset", "en", "--text-field", "body")
    assert code == 0, err
    (train, val), _ = corpus(tmp_path)
    assert sorted(train + val) == sorted(texts)


@pytest.mark.parametrize(("preset", "repo"), dataset.PRESETS.items())
def test_presets_and_limits(hub, tmp_path, command, preset, repo):
    for index in range(3):
        name = f"data/train-{index:05d}-of-00003.parquet"
        hub.add(repo, name, parquet(tmp_path, numbered(100, 100 * index)))
    code, _, err = command("hf", "--preset", preset, "--limit-rows", "150", "--val-fraction", "0.1")
    assert code == 0, err
    (train, val), _ = corpus(tmp_path)
    assert sorted(train + val) == sorted(numbered(150)) and len(val) == 15
    assert hub.asked("GET /cdn/") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["owner/other"], "cannot list data set owner/other: RepositoryNotFoundError"),
        ([REPO, "--split", "validation"], "has no split 'validation'; it has train.parquet"),
        ([REPO, "--text-field", "body"], "no column 'body', only id, text: set --text-field"),
        ([REPO, "--text-field", "id"], "column 'id' of"),
        (["owner/torn"], "is not a readable parquet file"),
        (["owner/empty"], "a corpus needs two"),
        (["owner/gated"], "cannot download train-1.parquet of owner/gated: GatedRepoError"),
    ],
)
def test_mistakes_leave_nothing_and_are_one_line(hub, tmp_path, command, arguments, message):
    content = parquet(tmp_path, numbered(10))
    hub.add(REPO, "train.parquet", content)
    hub.add("owner/torn", "train.parquet", content[:-10])
    hub.add("owner/empty", "train.parquet", parquet(tmp_path, pa.array([], pa.string())))
    hub.add("owner/gated", "train-0.parquet", content)
    hub.add("owner/gated", "train-1.parquet", content)
    hub.faults["train-1.parquet"] = "gated"
    code, _, err = command("hf", "--dataset", *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err
    assert {path.name for path in (tmp_path / "base").iterdir()} <= {".base_data_custom.lock"}


def test_offline_mode_reads_the_local_cache(hub, tmp_path, command, monkeypatch):
    folder = tmp_path / "hf" / "hub" / "datasets--owner--texts"
    snapshot = folder / "snapshots" / hub.commit(REPO)
    snapshot.mkdir(parents=True)
    (snapshot / "train.parquet").write_bytes(parquet(tmp_path, numbered(30)))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(hub.commit(REPO))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = command("hf", "--dataset", REPO)
    assert code == 0, err
    assert sum(map(len, corpus(tmp_path)[0])) == 30 and not hub.requests
    code, _, err = command("hf", "--dataset", "owner/other")
    assert code == 2 and "HF_HUB_OFFLINE is set, and it is not in the local cache" in err


def test_an_unclear_subset_is_asked_for():
    with pytest.raises(UsageError, match="several subsets: set `subset` to one of en, fr"):
        select_files(listing(*NAMES, configs=(CONFIGS[0], CONFIGS[2])), None, "train")
    with pytest.raises(NotFound, match="no subset 'es'; it has en, de, fr"):
        select_files(listing(*NAMES, configs=CONFIGS), "es", "train")


def test_a_large_row_group_is_read_piece_by_piece(hub, tmp_path, command):
    """The corpus has row groups of 1,024 whatever the source has."""
    hub.add(REPO, "train.parquet", parquet(tmp_path, numbered(5000), row_group_size=5000))
    assert command("hf", "--dataset", REPO)[0] == 0
    metadata = pq.ParquetFile(tmp_path / "base/base_data_custom/shard_00000.parquet").metadata
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert rows == [1024, 1024, 1024, 1024, 879]

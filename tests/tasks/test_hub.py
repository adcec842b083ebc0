"""Data sets of the Hub: downloaded once, complete, in order; damage is an error."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from huggingface_hub import constants

from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.paths import Paths
from nanochat_jax.tasks import gsm8k, hub


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """Two parquet files of one split, and others."""
    with HubServer() as server:
        for name, numbers in {
            "main/train-00005-of-00002.parquet": range(5, 10),
            "main/train-00000-of-00002.parquet": range(5),
            "main/test-00000-of-00001.parquet": range(5),
        }.items():
            pq.write_table(pa.table({"n": list(numbers)}), tmp_path / "x.parquet")
            server.add("owner/name", name, (tmp_path / "x.parquet").read_bytes())
        server.add("owner/name", "README.md", b"# Data")
        server.connect(monkeypatch, tmp_path)
        yield server


def load_split(server, tmp_path, split="train"):
    data = hub.HubData("owner/name", server.commit("owner/name"))
    return hub.load_split(Paths(tmp_path), data, "main", split)["n"].to_pylist()


def test_a_split_is_fetched_once_and_in_order(tmp_path, hub_server):
    folder = tmp_path / "task_data/owner--name/main/train"
    folder.mkdir(parents=True)
    (folder / "00000.parquet").write_bytes(b"torn")  # without a manifest: fetched again
    hub_server.faults["main/train-00005-of-00002.parquet"] = "torn"
    assert load_split(hub_server, tmp_path) == list(range(10))
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000.parquet",
        "00001.parquet",
        "manifest.json",
        "source.json",
    ]
    assert json.loads((folder / "manifest.json").read_text()) == ["00000.parquet", "00001.parquet"]
    source = json.loads((folder / "source.json").read_text())
    assert source["revision"] == hub_server.commit("owner/name") and source["files"][1].startswith(
        "main/train-00005"
    )
    assert {path.name for path in folder.parent.iterdir()} == {"train", ".train.lock"}
    hub_server.requests.clear()
    assert load_split(hub_server, tmp_path) == list(range(10)) and not hub_server.requests

    class Order(hub.HubTask):
        data = hub.HubData("owner/name", "commit")
        columns = ("n",)

        def get_example(self, index):
            return self.row(index)

    task = Order(Paths(tmp_path), "main", "train")
    assert [row["n"] for row in task] == np.random.default_rng(42).permutation(10).tolist()


def test_data_that_cannot_be_downloaded_is_an_error_that_names_it(
    tmp_path, hub_server, monkeypatch
):
    hub_server.faults["main/train-00005-of-00002.parquet"] = "gated"
    with pytest.raises(NotFound, match=r"owner/name \(main, train\) is not in .*GatedRepoError"):
        load_split(hub_server, tmp_path)
    folder = tmp_path / "task_data/owner--name/main/train"
    assert [path.name for path in folder.iterdir()] == [".partial"], "nothing that looks complete"
    with pytest.raises(NotFound, match=r"it has no files main/validation-\*\.parquet"):
        load_split(hub_server, tmp_path, "validation")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(NotFound, match=r"owner/name \(main, train\)"):
            load_split(hub_server, tmp_path)
    hub_server.faults.clear()
    hub_server.requests.clear()
    assert load_split(hub_server, tmp_path) == list(range(10))
    assert hub_server.asked("GET /cdn/") == 1  # the first file existed


@pytest.mark.parametrize(
    "files, manifest",
    [
        ([], '["00000.parquet"]'),
        (["00000.parquet"], "[broken"),
        ([], "[]"),
        ([], "[" * 100_000),
        ([], "3"),
        ([], "[3]"),
    ],
)
def test_damaged_data_is_an_error(tmp_path, no_network, files, manifest):
    folder = tmp_path / "task_data/owner--name/main/train"
    folder.mkdir(parents=True)
    for file in files:
        pq.write_table(pa.table({"n": [1]}), folder / file)
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(UsageError, match=r"owner/name \(main, train\)"):
        hub.load_split(Paths(tmp_path), hub.HubData("owner/name", "commit"), "main", "train")


@pytest.mark.parametrize(
    "table, message",
    [
        ({"question": ["a"]}, "has 0 columns 'answer'"),
        ({"question": ["a"], "answer": [None]}, "has rows without 'answer'"),
    ],
)
def test_rows_that_a_task_cannot_read_are_refused(tmp_path, no_network, table, message):
    folder = tmp_path / "task_data/openai--gsm8k/main/train"
    folder.mkdir(parents=True)
    pq.write_table(pa.table(table), folder / "00000.parquet")
    (folder / "manifest.json").write_text('["00000.parquet"]')
    with pytest.raises(UsageError, match=message):
        gsm8k.GSM8K(Paths(tmp_path), "train")

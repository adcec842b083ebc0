"""Data sets of the Hub: downloaded once, complete, in order; damage is an error."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer

from nanochat_jax.errors import UsageError
from nanochat_jax.paths import Paths
from nanochat_jax.tasks import gsm8k, hub


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """Two parquet files of one split at the pinned commit, and others; the client is told to ask
    this server.
    """
    with HubServer() as server:
        pq.write_table(pa.table({"n": list(range(10))}), tmp_path / "whole.parquet")
        for start in (5, 0):
            pq.write_table(pa.table({"n": list(range(start, start + 5))}), tmp_path / "x.parquet")
            server.add(
                "owner/name",
                f"main/train-{start:05d}-of-00002.parquet",
                (tmp_path / "x.parquet").read_bytes(),
            )
        server.add(
            "owner/name", "main/test-00000-of-00001.parquet", (tmp_path / "x.parquet").read_bytes()
        )
        server.add("owner/name", "README.md", b"# Data")
        yield server


FETCH = """
import json, sys
from pathlib import Path
from nanochat_jax.errors import NotFound
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.hub import HubData, load_split
commit, split, base = sys.argv[1:]
try:
    print(json.dumps(load_split(Paths(Path(base)), HubData("owner/name", commit), "main", split)["n"].to_pylist()))
except NotFound as error:
    print(json.dumps(str(error)))
"""


def fetch_split(server, tmp_path, split="train", **environment):
    """In a process of its own, as the Hub's client reads its environment when it is imported."""
    env = os.environ | server.environment(tmp_path) | environment
    arguments = [sys.executable, "-c", FETCH, server.commit("owner/name"), split, str(tmp_path)]
    return json.loads(
        subprocess.run(arguments, env=env, capture_output=True, text=True, check=True).stdout
    )


def test_a_split_is_fetched_once_and_in_order(tmp_path, hub_server):
    folder = tmp_path / "task_data/owner--name/main/train"
    folder.mkdir(parents=True)
    (folder / "00000.parquet").write_bytes(b"torn")  # without a manifest: fetched again
    hub_server.faults["main/train-00005-of-00002.parquet"] = "torn"
    assert fetch_split(hub_server, tmp_path) == list(range(10))
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
    assert fetch_split(hub_server, tmp_path) == list(range(10)) and not hub_server.requests

    class Order(hub.HubTask):
        data = hub.HubData("owner/name", "commit")
        columns = ("n",)

        def get_example(self, index):
            return self.row(index)

    task = Order(Paths(tmp_path), "main", "train")
    assert [row["n"] for row in task] == np.random.default_rng(42).permutation(10).tolist()


def test_data_that_cannot_be_had_is_an_error_that_names_it(tmp_path, hub_server):
    second = "main/train-00005-of-00002.parquet"
    hub_server.faults[second] = "gated"
    message = fetch_split(hub_server, tmp_path)
    assert "data set owner/name (main, train) is not in" in message and "GatedRepoError" in message
    folder = tmp_path / "task_data/owner--name/main/train"
    assert [path.name for path in folder.iterdir()] == [".partial"], "nothing that looks complete"
    message = fetch_split(hub_server, tmp_path, "validation")
    assert (
        "owner/name (main, validation)" in message
        and "it has no files main/validation-*.parquet" in message
    )
    assert "owner/name (main, train)" in fetch_split(hub_server, tmp_path, HF_HUB_OFFLINE="1")
    hub_server.faults.clear()
    hub_server.requests.clear()
    assert fetch_split(hub_server, tmp_path) == list(range(10))
    assert hub_server.asked("GET /cdn/") == 1  # the first file was there already


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

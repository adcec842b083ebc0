"""Downloads from a server on this machine that speaks the Hub's protocol: whole shards arrive, torn ones never do."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import dataset
from nanochat_jax.dataset import HUB_CORPORA, measure

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """`/datasets/<repo>/resolve/main/<file>` redirects to `/cdn/<file>` on another host, as for large files of the Hub.

    How a file is served is the server's `faults[file]`: "torn" closes the connection in the middle of the first body,
    "busy" answers 503 three times, "short" always gives a shorter body than was announced, "gated" answers 403.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        hub = self.server
        name = self.path.rpartition("/")[2]
        fault = hub.faults.get(name)
        hub.requests[f"{self.command} {self.path}"] += 1
        hub.tokens.add(self.headers.get("Authorization"))
        content = hub.files.get(name)
        if content is None:
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        if fault == "gated":
            return self.reply(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Ask for access first."})
        if self.path.startswith("/datasets/"):
            assert "/resolve/" in self.path
            etag = hashlib.sha256(content).hexdigest()
            return self.reply(
                302,
                {
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-Etag": f'"{etag}"',
                    "X-Linked-Size": str(len(content)),
                    "ETag": f'"{etag}"',
                    "Location": f"http://localhost:{hub.server_port}/cdn/{name}",
                },
            )
        count = hub.requests[f"{self.command} {self.path}"]
        if fault == "busy" and count <= 3:
            return self.reply(503, {})
        if fault == "short":
            content = content[: len(content) // 2]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        torn = fault == "torn" and count == 1
        self.reply(206 if start else 200, headers, content[start:] if with_body else b"", torn=torn)

    def reply(self, status, headers, body=b"", torn=False):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if torn else body)
        self.close_connection = torn

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.faults, server.requests, server.tokens = {}, {}, Counter(), set()
    for index in (*range(4), 6542, 1822):
        path = tmp_path / "shard.parquet"
        pq.write_table(pa.table({"text": [f"document {i} of shard {index}" for i in range(500)]}), path)
        server.files[f"shard_{index:05d}.parquet"] = path.read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(arguments, hub, tmp_path, **environment):
    env = {
        **os.environ,
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_secret",
        "NO_PROXY": "127.0.0.1,localhost",
        **environment,
    }
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)


def command(arguments, hub, tmp_path, **environment):
    return run(["-m", "nanochat_jax.dataset", *arguments], hub, tmp_path, **environment)


DOWNLOAD = """
import json, sys
from pathlib import Path
from nanochat_jax.dataset import download
print(json.dumps(download("karpathy/corpus", sys.argv[2:], Path(sys.argv[1]), num_workers=2, wait_s=0.01)))
"""


def download(names, hub, tmp_path, **environment):
    """Failures that `download` reports, and the files it leaves, hidden ones included."""
    result = run(["-c", DOWNLOAD, str(tmp_path / "shards"), *names], hub, tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}


def test_download_adds_the_pinned_validation_shard(hub, tmp_path):
    result = command(["-n", "2", "-w", "3"], hub, tmp_path)
    assert result.returncode == 0, result.stderr
    directory = tmp_path / "base" / "base_data_climbmix"
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {name: hub.files[name] for name in names}
    assert "Bearer hf_secret" in hub.tokens

    (directory / names[0]).write_bytes(hub.files[names[0]][:-100])  # torn by whatever else wrote it
    hub.requests.clear()
    result = command(["-n", "3"], hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 of 4 shards are in" in result.stderr
    assert sorted(path.name for path in directory.iterdir()) == [*names[:2], "shard_00002.parquet", names[2]]
    assert (directory / names[0]).read_bytes() == hub.files[names[0]]
    assert not any(name in request for request in hub.requests for name in names[1:])

    result = command(["info"], hub, tmp_path)
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [row[:4] for row in rows] == [["climbmix", "train", "3", "1,500"], ["climbmix", "val", "1", "500"]]


def test_failed_shards_are_listed_and_the_exit_code_is_one(hub, tmp_path):
    del hub.files["shard_00001.parquet"]
    result = command(["-n", "2", "--dataset", "fineweb"], hub, tmp_path)
    assert result.returncode == 1
    assert "2 of 3 shards of fineweb are in" in result.stdout
    assert [line for line in result.stderr.splitlines() if line.startswith("failed: ")][0].startswith(
        "failed: shard_00001.parquet: "
    )
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in (tmp_path / "base" / "base_data").iterdir()) == [
        "shard_00000.parquet",
        "shard_01822.parquet",
    ]


def test_torn_and_busy_downloads_are_tried_again(hub, tmp_path):
    hub.faults |= {"shard_00000.parquet": "torn", "shard_00001.parquet": "busy"}
    names = ["shard_00000.parquet", "shard_00001.parquet"]
    failed, files = download(names, hub, tmp_path)
    assert failed == {}
    assert files == {name: hub.files[name] for name in names}
    assert hub.requests["GET /cdn/shard_00000.parquet"] == 2 and hub.requests["GET /cdn/shard_00001.parquet"] == 4


def test_what_is_not_a_whole_shard_never_gets_its_name(hub, tmp_path):
    whole = hub.files["shard_00000.parquet"]
    hub.faults |= {"shard_00000.parquet": "short", "shard_00003.parquet": "gated"}
    hub.files["shard_00001.parquet"] = whole[: len(whole) // 2]  # announced so: the size is right, the footer missing
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "other.parquet")
    hub.files["shard_00002.parquet"] = (tmp_path / "other.parquet").read_bytes()
    names = [f"shard_{index:05d}.parquet" for index in (0, 1, 2, 3, 6542)]
    failed, files = download(names, hub, tmp_path)
    assert set(files) == {"shard_06542.parquet"}
    assert set(failed) == set(names[:4])
    assert "should be of size" in failed[names[0]]
    assert "not a readable parquet file" in failed[names[1]]
    assert "has no column 'text'" in failed[names[2]]
    assert hub.requests["GET /cdn/shard_00001.parquet"] == 5
    assert hub.requests["GET /cdn/shard_00003.parquet"] == 0  # asking again would not help


def test_offline_mode_uses_the_local_cache_alone(hub, tmp_path):
    folder = tmp_path / "hf" / "hub" / "datasets--karpathy--corpus"
    for path, text in (
        (folder / "refs" / "main", COMMIT.encode()),
        (folder / "snapshots" / COMMIT / "shard_00000.parquet", hub.files["shard_00000.parquet"]),
    ):
        path.parent.mkdir(parents=True)
        path.write_bytes(text)
    failed, files = download(["shard_00000.parquet", "shard_00001.parquet"], hub, tmp_path, HF_HUB_OFFLINE="1")
    assert set(failed) == {"shard_00001.parquet"}
    assert files == {"shard_00000.parquet": hub.files["shard_00000.parquet"]}
    assert not hub.requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "-n 0 training shards: expected 1 to 6542, or -1 for all"),
        (["-n", "2000", "--dataset", "fineweb"], "expected 1 to 1822"),
        (["-n", "2", "-w", "0"], "-w 0 workers"),
        (["everything"], "unrecognized arguments: everything"),
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
    pq.write_table(pa.table({"text": texts}), tmp_path / "shard_0.parquet", compression="zstd", use_dictionary=False)
    size = measure([tmp_path / "shard_0.parquet"])
    assert size.documents == 3000
    assert size.text_bytes == pytest.approx(sum(len(text.encode()) for text in texts), rel=0.01)

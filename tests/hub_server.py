"""A server on this machine that speaks the Hub's protocol, with faults on demand: downloads of data
sets, uploads of models.

    /datasets/<repo>/resolve/<revision>/<file>    HEAD: size, checksum, commit; GET: redirects to
    /cdn/ on another host /api/datasets/<repo>/revision/<revision>      the commit, the list of
    files, the card /cdn/<repo>/<revision>/<file>                 the bytes, ranges too
    /files/<name>                                 any other file
    /api/repos/create, /api/models/<repo>/...     an upload, as one commit to `models`; refused
    /<repo>.git/info/lfs/..., /lfs/<oid>          without the token hf_secret

`faults[file name]` is how /cdn/ serves a file:
    "torn"   closes the connection in the middle of the first body        "gone"    always does,
    and sends nothing new "busy"   answers 503 three times
    "error"   answers 500 always "short"  gives a shorter body than was announced, and says so
    "long"    gives a longer one "flip"   gives other bytes the first time
    "slow"    gives the first body in drops "no range"  ignores ranges, and tears the first body
    "gated"   answers 403 before anything else
"""

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

from huggingface_hub.utils import close_session


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}  # (repo, revision) -> files
        self.cards: dict[str, dict] = {}
        self.plain: dict[str, bytes] = {}
        self.models: dict[str, dict[str, bytes]] = {}  # repo -> files
        self.created: list[dict] = []  # bodies of requests to create a model
        self.lfs: dict[str, bytes] = {}  # uploaded, by checksum
        self.faults: dict[str, str] = {}
        self.requests: Counter[str] = Counter()  # "GET /path"
        self.ranges: list[tuple[str, int]] = []  # (file name, first byte) of each ranged request
        self.tokens: dict[str, set] = {"hub": set(), "cdn": set()}

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        close_session()  # a thread waits for every connection that the client has open
        self.shutdown()
        self.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo, name, content, revision="main"):
        for key in (revision, self.commit(repo, revision)):
            self.repos.setdefault((repo, key), {})[name] = content

    @staticmethod
    def commit(repo, revision="main"):
        return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()

    def asked(self, part):
        """Requests for a path that contains `part`."""
        return sum(count for request, count in self.requests.items() if part in request)

    def environment(self, base_dir):
        return {
            "NANOCHAT_BASE_DIR": str(base_dir / "base"),
            "HF_HOME": str(base_dir / "hf"),
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_secret",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def connect(self, monkeypatch, base_dir):
        """Point this process's client, which read its environment at import, to this server."""
        from huggingface_hub import constants, file_download
        from huggingface_hub.utils import _http

        from nanochat_jax.data import hub

        for name, value in self.environment(base_dir).items():
            monkeypatch.setenv(name, value)
        cache = str(base_dir / "hf" / "hub")
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": cache,
            "DOWNLOAD_CHUNK_SIZE": 500,  # bytes written together; the tests' files are small
        }.items():
            monkeypatch.setattr(constants, name, value)
        patient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        for module in (hub, file_download, _http):  # between attempts
            monkeypatch.setattr(module, "time", patient)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_PUT(self):
        oid = self.path.rpartition("/")[2]
        self.server.lfs[oid] = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(self.server.lfs[oid]).hexdigest() == oid
        self.reply(200, {})

    def do_POST(self):
        path, url = unquote(urlsplit(self.path).path), self.server.url
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests[f"POST {path}"] += 1
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.server.created.append(wanted)
            repo = f"{wanted['organization']}/{wanted['name']}"
            exists = repo in self.server.models
            self.server.models.setdefault(repo, {})
            return self.json({"url": f"{url}/{repo}", "name": repo}, 409 if exists else 200)
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.json({"transfer": "basic", "objects": objects})
        repo = "/".join(path.split("/")[3:5])
        if repo not in self.server.models:
            return self.reply(404, {"X-Error-Code": "RepoNotFound"})
        if "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.json({"files": modes})
        for line in map(json.loads, body.splitlines()):  # of /commit/main
            value = line["value"]
            if line["key"] == "file":
                self.server.models[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.models[repo][value["path"]] = self.server.lfs[value["oid"]]
        commit = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{url}/{repo}/commit/0"}
        self.json(commit)

    def json(self, content, status=200):
        self.reply(status, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests[f"{self.command} {path}"] += 1
        kind, _, rest = path.lstrip("/").partition("/")
        if kind == "files":
            content = self.server.plain.get(rest)
            return self.reply(404, {}) if content is None else self.body(rest, content)
        if kind == "cdn":
            self.server.tokens["cdn"].add(self.headers.get("Authorization"))
            owner, name, revision, file = rest.split("/", 3)
            return self.body(file, self.server.repos[f"{owner}/{name}", unquote(revision)][file])
        self.server.tokens["hub"].add(self.headers.get("Authorization"))
        if kind == "api" and rest.startswith("datasets/"):
            _, owner, name, _, revision = rest.split("/", 4)
            return self.describe(f"{owner}/{name}", revision)
        if kind != "datasets":
            return self.reply(404, {})
        repo, _, rest = rest.partition("/resolve/")
        found = [
            key for key in self.server.repos if key[0] == repo and rest.startswith(f"{key[1]}/")
        ]
        if not found:
            return self.reply(404, {"X-Error-Code": "RepoNotFound"})
        revision, file = found[0][1], rest.removeprefix(f"{found[0][1]}/")
        content = self.server.repos[found[0]].get(file)
        if content is None:
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        if self.server.faults.get(file) == "gated":
            return self.reply(
                403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Ask for access first."}
            )
        digest = hashlib.sha256(content).hexdigest()
        path = f"cdn/{repo}/{revision.replace('/', '%2F')}/{file}"
        self.reply(
            302,
            {
                "X-Repo-Commit": self.server.commit(repo, revision),
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(content)),
                "ETag": f'"{digest}"',
                "Location": f"http://localhost:{self.server.server_port}/{path}",
            },
        )

    def describe(self, repo, revision):
        files = self.server.repos.get((repo, revision))
        if files is None:
            return self.reply(
                404, {"X-Error-Code": "RepoNotFound" if revision == "main" else "RevisionNotFound"}
            )
        facts = {
            "id": repo,
            "sha": self.server.commit(repo, revision),
            "siblings": [{"rfilename": f} for f in files],
        }
        if repo in self.server.cards:
            facts["cardData"] = self.server.cards[repo]
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(facts).encode())

    def body(self, name, content):
        fault = self.server.faults.get(name)
        count = self.server.requests[f"{self.command} {unquote(self.path)}"]
        if fault == "error" or (fault == "busy" and count <= 3):
            return self.reply(500 if fault == "error" else 503, {})
        if fault == "short":
            content = content[: len(content) // 2]
        if fault == "long":
            content += b"more"
        if fault == "flip" and count == 1:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start:
            self.server.ranges.append((name, start))
        if fault == "no range":
            start = 0
        headers = (
            {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        )
        torn = fault == "gone" or (fault in ("torn", "no range") and count == 1)
        stop = len(content) // 2 if torn else len(content)
        self.reply(
            206 if start else 200,
            headers | {"Content-Length": str(len(content) - start)},
            content[start : max(start, stop)],
            torn=torn,
            slow=fault == "slow" and count == 1,
        )

    def reply(self, status, headers, body=b"", torn=False, slow=False):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for start in range(
                0, len(body), step := max(1, len(body) // 20 if slow else len(body))
            ):
                self.wfile.write(body[start : start + step])
                time.sleep(0.02 * slow)
        self.close_connection = torn

    def log_message(self, *args):
        pass

"""A server on this machine that speaks the JSON API of Google Cloud Storage, as far as checkpoints
need it.

Objects live in memory, in `objects`; any bucket but `missing` exists. `before_change(name)` is
called before an object is stored or deleted; it may raise `Refused`, or kill the client.
`environment` points clients at the server: TensorStore, which Orbax writes arrays with, and gcsfs
and Google's own client, which it writes all else with.
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# looks for another protocol; gcsfs asks when it is imported
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


class Refused(Exception):
    """To be answered with this status."""

    def __init__(self, status: int):
        self.status = status


class GCSServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}  # "bucket/name" -> content
        self.generations: dict[str, int] = {}
        # resumable ones on their way: id -> name, what has come
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.before_change: Callable[[str], None] = lambda name: None
        self.lock, self.clock = threading.RLock(), 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, address):
        pass  # a client that was killed, or is done

    @property
    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",
            "GOOGLE_CLOUD_PROJECT": "test",
        }

    def under(self, prefix: str) -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def store(self, name: str, content: bytes, expected: str | None = None) -> dict:
        self.before_change(name)
        with self.lock:
            if expected is not None and int(expected) != self.generations.get(name, 0):
                raise Refused(412)
            self.clock += 1
            self.objects[name], self.generations[name] = content, self.clock
            return self.describe(name)

    def describe(self, name: str) -> dict:
        bucket, key = name.split("/", 1)
        content, now = self.objects[name], time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        return {
            "kind": "storage#object",
            "id": name,
            "bucket": bucket,
            "name": key,
            "size": str(len(content)),
            "generation": str(self.generations[name]),
            "metageneration": "1",
            "timeCreated": now,
            "updated": now,
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "storageClass": "STANDARD",
        }

    def listing(self, bucket: str, query: dict[str, str]) -> dict:
        start, items, prefixes = f"{bucket}/", [], set()
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        for name in self.under(start + prefix):
            key = name[len(start) :]
            if key < query.get("startOffset", "") or key >= query.get("endOffset", "\U0010ffff"):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # else each answer waits 40 ms for an acknowledgement
    disable_nagle_algorithm, wbufsize = True, -1
    server: GCSServer

    def log_message(self, *_):
        pass

    def _answer(
        self, status: int, content: bytes = b"", kind: str = "application/json", **headers: str
    ):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if status not in (204, 304):  # which have no body
            self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _handle(self):
        body = self._body()
        url = urlsplit(self.path)
        query = {
            key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()
        }
        try:
            self._route(url.path, query, body)
        except Refused as refused:
            message = {"error": {"code": refused.status, "message": f"status {refused.status}"}}
            self._answer(
                refused.status, b"" if refused.status == 304 else json.dumps(message).encode()
            )

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _route(self, path: str, query: dict[str, str], body: bytes):
        match = re.fullmatch(r"/(upload/|download/)?storage/v1/b/([^/]+)(/o)?(?:/(.+))?", path)
        if match is None:
            raise Refused(404)
        kind, bucket, objects, key = match[1], unquote(match[2]), match[3], match[4]
        if bucket == "missing":
            raise Refused(404)
        if key and "/rewriteTo/" in key:
            source, target = key.split("/rewriteTo/b/")
            other, target = target.split("/o/")
            made = self.server.store(
                f"{unquote(other)}/{unquote(target)}", self._content(f"{bucket}/{unquote(source)}")
            )
            size = made["size"]
            return self._json(
                {
                    "kind": "storage#rewriteResponse",
                    "done": True,
                    "resource": made,
                    "objectSize": size,
                    "totalBytesRewritten": size,
                }
            )
        if kind == "upload/":
            return self._upload(bucket, query, body)
        if not objects:
            return self._json(
                {"kind": "storage#bucket", "id": bucket, "name": bucket, "storageClass": "STANDARD"}
            )
        if not key:
            return self._json(self.server.listing(bucket, query))
        name = f"{bucket}/{unquote(key)}"
        if self.command == "DELETE":
            with self.server.lock:
                self._content(name)
                if (
                    int(query.get("ifGenerationMatch", self.server.generations[name]))
                    != self.server.generations[name]
                ):
                    raise Refused(412)
                self.server.before_change(name)
                del self.server.objects[name], self.server.generations[name]
            return self._answer(204)
        content, generation = self._content(name), self.server.generations[name]
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            raise Refused(304)
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            raise Refused(412)
        if query.get("alt") != "media":
            return self._json(self.server.describe(name))
        headers = {
            "X_Goog_Generation": str(generation),
            "X_Goog_Stored_Content_Length": str(len(content)),
            "X_Goog_Stored_Content_Encoding": "identity",
        }
        asked = re.fullmatch(r"bytes=(\d+)?-(\d+)?", self.headers.get("Range", ""))
        if asked is None:
            return self._answer(200, content, "application/octet-stream", **headers)
        first, last = asked[1], asked[2]
        begin = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        if begin >= len(content):
            raise Refused(416)
        headers["Content_Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        return self._answer(206, content[begin:end], "application/octet-stream", **headers)

    def _json(self, value: dict):
        self._answer(200, json.dumps(value).encode())

    def _content(self, name: str) -> bytes:
        try:
            return self.server.objects[name]
        except KeyError:
            raise Refused(404) from None

    def _upload(self, bucket: str, query: dict[str, str], body: bytes):
        kind, expected = query.get("uploadType"), query.get("ifGenerationMatch")
        if "upload_id" in query:
            name, held = self.server.uploads[query["upload_id"]]
            # more is to come
            if re.fullmatch(r"bytes .*/\*", self.headers.get("Content-Range", "")):
                self.server.uploads[query["upload_id"]] = (name, held + body)
                return self._answer(308, Range=f"bytes=0-{len(held + body) - 1}")
            return self._json(self.server.store(name, held + body))
        if kind == "media":
            return self._json(self.server.store(f"{bucket}/{query['name']}", body, expected))
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            about, content = message_from_bytes(head + body).get_payload()
            name = query.get("name") or json.loads(about.get_payload())["name"]
            return self._json(
                self.server.store(f"{bucket}/{name}", content.get_payload(decode=True), expected)
            )
        if kind == "resumable":
            with self.server.lock:
                upload = str(len(self.server.uploads))
                self.server.uploads[upload] = (
                    f"{bucket}/{query.get('name') or json.loads(body)['name']}",
                    b"",
                )
            place = (
                f"{self.server.environment['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket}/o"
            )
            return self._answer(200, Location=f"{place}?uploadType=resumable&upload_id={upload}")
        raise Refused(400)

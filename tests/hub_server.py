"""A stand-in for the Hugging Face hub's HTTP interface, on this machine: what huggingface_hub asks of it for a model.

After the hub's documented interface: GET /api/models/ID/revision/REV?blobs=true lists the files; HEAD and GET of
/ID/resolve/REV/FILE answer small files themselves and send large ones (kept with Git LFS, or as here with Xet) to
another host, which knows nothing of tokens. Faults are switched on by the test.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes: from there on a file is kept elsewhere


@dataclass
class Repo:
    files: dict[str, bytes]
    commit: str = "c" * 40
    gated: bool = False
    private: bool = False


@dataclass
class Hub:
    """What the server has, what it was asked, and what goes wrong."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers
    endpoint: str = ""
    storage: str = ""  # the other host
    token: str = "secret"
    cuts: list[int] = field(default_factory=list)  # of each next large answer: bytes until the connection ends
    statuses: list[int] = field(default_factory=list)  # of each next large answer, instead of it
    damage: bool = False  # a byte of large files
    extra: bytes = b""  # behind large files
    ranges: bool = True  # large files can be had in part
    answer: bytes | None = None  # to everything, instead

    def asked(self, method: str, part: str) -> list[dict[str, str]]:
        """The headers of the requests whose path has `part` in it."""
        return [headers for m, path, headers in self.requests if m == method and part in path]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        if hub.answer is not None:
            self.reply(200, hub.answer, {"Content-Type": "text/html"})
        elif path.startswith("/storage/"):
            self.large(path.rsplit("/", 1)[1])
        elif path.startswith("/api/models/"):
            self.listing(path.removeprefix("/api/models/"))
        else:
            self.resolve(path[1:])

    def find(self, name: str, revision: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {self.hub.token}"):
            self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        if revision not in ("main", repo.commit):
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return repo

    def listing(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        if repo := self.find(name, revision or "main"):
            siblings = []
            for file, data in repo.files.items():
                entry: dict[str, object] = {"rfilename": file, "size": len(data), "blobId": git_blob(data)}
                if len(data) >= LARGE:
                    entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
                siblings.append(entry)
            body = json.dumps({"id": name, "sha": repo.commit, "siblings": siblings}).encode()
            self.reply(200, body, {"Content-Type": "application/json"})

    def resolve(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        repo = self.find(name, revision)
        if repo is None:
            return
        commit = {"X-Repo-Commit": repo.commit}
        data = repo.files.get(file)
        if data is None:
            self.reply(404, b"", commit | {"X-Error-Code": "EntryNotFound"})
        elif repo.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.reply(403, b"", commit | {"X-Error-Code": "GatedRepo"})
        elif len(data) < LARGE:
            self.reply(200, data, commit | {"ETag": f'"{git_blob(data)}"'})
        else:
            headers = {
                "X-Linked-Etag": f'"{sha256(data)}"',
                "X-Linked-Size": str(len(data)),
                "X-Xet-Hash": sha256(b"xet" + data),
                "Link": f'<{self.hub.endpoint}/api/models/{name}/xet-read-token/{repo.commit}>; rel="xet-auth"',
                "Location": f"{self.hub.storage}/storage/{sha256(data)}?signature=x",
            }
            self.reply(302, b"", commit | headers)

    def large(self, digest: str) -> None:
        hub = self.hub
        data = next(d for r in hub.repos.values() for d in r.files.values() if sha256(d) == digest)
        if hub.statuses:
            self.reply(hub.statuses.pop(0), b"", {})
            return
        if hub.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        data += hub.extra
        first, status, headers = 0, 200, {"ETag": f'"{digest}"'}
        if hub.ranges and (asked := self.headers.get("Range")):
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            if first >= len(data):
                self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            status, headers["Content-Range"] = 206, f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.reply(status, data[first:], headers, cut=hub.cuts.pop(0) if hub.cuts else None)

    def reply(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on two ports of this machine, which are two hosts to a client: itself and its storage."""
    hub = Hub()
    handler = type("HandlerOfOne", (Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()

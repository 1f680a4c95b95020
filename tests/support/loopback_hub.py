"""A small Hugging Face hub on the loopback interface: what huggingface_hub asks to list, download and upload.

Commands find it by `environment`, which is to be given to a subprocess: huggingface_hub reads it when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from loopback_uploads import Uploads

Headers = dict[str, str]
_INFO = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_CONTENT = re.compile(r"/content/([0-9a-f]+)")


class LoopbackHub:
    """What the hub has, what it was asked, and how it misbehaves.

    Attributes:
        models: repository -> path -> content.
        put: SHA-256 -> content of the large files that were put, for a commit to name.
        asked: method, path and range of every request, in order.
        refuse: called with a path; returns status and headers of a refusal, or None.
        sent: called with a content; returns the bytes that are sent of it, whatever was announced.
        ranges: whether it sends the part of a content that was asked for, instead of all of it.
        hangs: whether it accepts requests and never answers.

    """

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.put: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.refuse: Callable[[str], tuple[int, Headers] | None] = lambda path: None
        self.sent: Callable[[bytes], bytes] = lambda content: content
        self.ranges, self.hangs = True, False
        self.closing = threading.Event()
        self.url = self.content_url = ""

    def environment(self, home: Path, **settings: str) -> dict[str, str]:
        """Return the environment of a program that uses this hub and a cache in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), **settings}

    def downloads(self) -> list[str]:
        """Return the ranges of the contents that were asked for; empty where all of it was."""
        return [byte_range for method, path, byte_range in self.asked if method == "GET" and "/content/" in path]

    def commit(self, repository: str) -> str:
        """Return a model's commit, which depends on its files."""
        contents = self.models[repository]
        return hashlib.sha1(b"".join(path.encode() + contents[path] for path in sorted(contents))).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about a client that has gone."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.hangs:
            self.hub.closing.wait()
            self.close_connection = True
            return
        refusal = self.hub.refuse(path)
        if refusal is not None:
            self._answer(*refusal, b"")
        elif found := _CONTENT.fullmatch(path):
            self._send_content(found[1])
        elif found := _TREE.fullmatch(path):
            self._of_model(found[1], found[2], self._send_tree)
        elif found := _RESOLVE.fullmatch(path):
            name, revision, file = found.groups()
            self._of_model(name, revision, lambda name: self._redirect(name, file))
        elif found := _INFO.fullmatch(path):
            self._of_model(found[1], found[2], self._send_info)
        else:
            self._answer(404, {}, b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.asked.append((self.command, path, ""))
        refusal = self.hub.refuse(path)
        if refusal is not None:
            self._answer(*refusal, b"")
            return
        status, value = Uploads(self.hub.url, self.hub.models, self.hub.put).answer(self.command, path, body)
        self._answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    do_PUT = do_POST

    def _body(self) -> bytes:
        """Return what the client sends, in one piece or in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _of_model(self, name: str, revision: str | None, answer: Callable[[str], None]) -> None:
        if name not in self.hub.models:
            self._answer(404, {"X-Error-Code": "RepoNotFound"}, b"")
        elif revision not in (None, "main", self.hub.commit(name)):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        else:
            answer(name)

    def _send_info(self, name: str) -> None:
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": "0" * 40, "lfs": _large_file(content, "sha256")}
            for path, content in self.hub.models[name].items()
        ]
        self._send_json({"id": name, "modelId": name, "sha": self.hub.commit(name), "tags": [], "siblings": siblings})

    def _send_tree(self, name: str) -> None:
        self._send_json(
            [
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": "0" * 40,
                    "lfs": _large_file(content, "oid"),
                }
                for path, content in self.hub.models[name].items()
            ]
        )

    def _redirect(self, name: str, path: str) -> None:
        content = self.hub.models[name].get(path)
        if content is None:
            self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
            return
        digest = hashlib.sha256(content).hexdigest()
        headers = {
            "Location": f"{self.hub.content_url}/content/{digest}",
            "X-Repo-Commit": self.hub.commit(name),
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
        }
        self._answer(302, headers, b"")

    def _send_content(self, digest: str) -> None:
        contents = [content for files in self.hub.models.values() for content in files.values()]
        content = next(content for content in contents if hashlib.sha256(content).hexdigest() == digest)
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = 0 if found is None or not self.hub.ranges else int(found[1])
        headers = {"ETag": f'"{digest}"', "Content-Length": str(len(content) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206 if start else 200, headers, self.hub.sent(content[start:]))

    def _send_json(self, value: Any) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _answer(self, status: int, headers: Headers, body: bytes) -> None:
        headers = {"Content-Length": str(len(body)), **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if len(body) != int(headers["Content-Length"]):
            self.close_connection = True  # which is how the client learns that nothing more comes

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""


def _large_file(content: bytes, hash_name: str) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {hash_name: digest, "size": len(content), "pointerSize": 134}


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """Run a hub in a thread, on a free port, until the block ends."""
    hub = LoopbackHub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.content_url = f"http://localhost:{server.server_port}"  # large files come from another host, as on the real hub
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, home: Path) -> None:
    """Let this process use a hub and a cache in `home`: set what huggingface_hub has read from the environment."""
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_ETAG_TIMEOUT": 1,
        "HF_HUB_DOWNLOAD_TIMEOUT": 1,
    }
    for name, value in settings.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)

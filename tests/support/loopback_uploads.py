"""What the loopback hub answers to uploads: a model is made, large files are put, a commit names all files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

Answer = tuple[int, Any]
_LARGE = (".gguf", ".safetensors")
_PREUPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/preupload/main")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_PUT = re.compile(r"/put/([0-9a-f]+)")
_COMMIT = re.compile(r"/api/models/([^/]+/[^/]+)/commit/main")


@dataclass
class Uploads:
    """The large files that were put, by SHA-256, and the models that commits are made in."""

    url: str
    models: dict[str, dict[str, bytes]]
    contents: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        """Return status and JSON for a POST or PUT."""
        if found := _PUT.fullmatch(path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.contents[found[1]] = body
            return 200, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := _PREUPLOAD.fullmatch(path):
            return 200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]}
        if found := _BATCH.fullmatch(path):
            return 200, {"transfer": "basic", "objects": [self._large(item) for item in json.loads(body)["objects"]]}
        if found := _COMMIT.fullmatch(path):
            return self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        return 404, {}

    def _create(self, wanted: dict[str, Any]) -> Answer:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.models:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.models[name] = {".gitattributes": b""}
        return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}

    def _mode(self, path: str) -> dict[str, Any]:
        return {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular", "shouldIgnore": False}

    def _large(self, item: dict[str, Any]) -> dict[str, Any]:
        wanted = {"oid": item["oid"], "size": item["size"]}
        known = {hashlib.sha256(content).hexdigest() for files in self.models.values() for content in files.values()}
        if item["oid"] in known:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/put/{item['oid']}"}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> Answer:
        files = self.models[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._content(value["oid"])
        commit = hashlib.sha1(repr(sorted(files)).encode()).hexdigest()
        return 200, {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"}

    def _content(self, digest: str) -> bytes:
        contents = [*self.contents.values(), *(content for files in self.models.values() for content in files.values())]
        return next(content for content in contents if hashlib.sha256(content).hexdigest() == digest)

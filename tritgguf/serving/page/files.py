"""The page's files, read once and served from memory: there is no path that a request could lead elsewhere."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
_INDEX = "index.html"


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent."""

    content: bytes
    media_type: str
    tag: str


def load() -> dict[str, PageFile]:
    """Return the page's files by the path of their URL; the index is at /."""
    found = dict[str, PageFile]()
    _load_folder(resources.files(__package__) / "static", "/", found)
    if "/" + _INDEX in found:
        found["/"] = found["/" + _INDEX]
    return found


def _load_folder(folder: Traversable, path: str, found: dict[str, PageFile]) -> None:
    for entry in folder.iterdir() if folder.is_dir() else []:
        if entry.is_dir():
            _load_folder(entry, f"{path}{entry.name}/", found)
        else:
            content, extension = entry.read_bytes(), "." + entry.name.rpartition(".")[2]
            kind = _TYPES.get(extension) or mimetypes.guess_type(entry.name)[0] or "application/octet-stream"
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[path + entry.name] = PageFile(content, kind, tag)


def add_routes(app: FastAPI, page_files: Mapping[str, PageFile]) -> None:
    """Serve files at their paths."""
    for path, file in page_files.items():
        app.add_api_route(path, _endpoint(file), methods=["GET", "HEAD"], include_in_schema=False)


def _endpoint(file: PageFile) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def send(request: Request) -> Response:
        headers = {"ETag": file.tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    return send

"""Limits on a request's body: its size, the time that it takes to come, and how deep its JSON is."""

from __future__ import annotations

import asyncio
import re

import numpy as np
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritgguf.serving.errors import ApiError, bad_request
from tritgguf.serving.responses import error_response
from tritgguf.serving.settings import ServerSettings

MOST_JSON_DEPTH = 100
_MOST_DISCARDED_BYTES = 256 << 20  # of a body that is too large, so that its sender reads the answer
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


class BodyLimits:
    """Middleware: reads a body before the app sees it, and refuses what is too large, too slow or too deep."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._most_bytes, self._seconds = settings.most_body_bytes, settings.body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
            if body is None:
                return  # the client has gone
            if json_depth(body) > MOST_JSON_DEPTH:
                raise bad_request(f"the body is nested more than {MOST_JSON_DEPTH} levels deep")
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        try:
            return await asyncio.wait_for(self._read_all(scope, receive), self._seconds)
        except asyncio.TimeoutError:
            message = f"the body has not come within {self._seconds:g} seconds"
            raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None

    async def _read_all(self, scope: Scope, receive: Receive) -> bytes | None:
        announced = Headers(scope=scope).get("content-length", "0")
        too_large = not announced.isdigit() or int(announced[:20]) > self._most_bytes
        parts, size, more = list[bytes](), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            too_large = too_large or size > self._most_bytes
            if too_large:
                parts.clear()
                if size > _MOST_DISCARDED_BYTES:
                    break
            else:
                parts.append(part)
        if too_large:
            message_text = f"the body has more than {self._most_bytes} bytes"
            raise ApiError(413, message_text, code="body_too_large", headers={"Connection": "close"})
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, and then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def json_depth(body: bytes) -> int:
    """Return how deep the brackets of a JSON text are nested; its strings do not count."""
    if body.count(b"[") + body.count(b"{") <= MOST_JSON_DEPTH:
        return 0
    characters = np.frombuffer(_STRING.sub(b"", body), np.uint8)
    opening = (characters == ord("[")) | (characters == ord("{"))
    closing = (characters == ord("]")) | (characters == ord("}"))
    return int(np.cumsum(opening.astype(np.int8) - closing.astype(np.int8), dtype=np.int64).max(initial=0))

"""Limits on a request's body: its size, the time that it takes to come, and how deep its JSON is."""

from __future__ import annotations

import asyncio

import numpy as np
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritgguf.serving.errors import ApiError, bad_request
from tritgguf.serving.responses import error_response
from tritgguf.serving.settings import ServerSettings

MOST_JSON_DEPTH = 100
_MOST_BODIES = 16  # of the largest size, that are held at once
_MOST_DISCARDED_BYTES = 256 << 20  # of a body that is too large, so that its sender reads the answer


class BodyLimits:
    """Middleware: reads a body before the app sees it, and refuses what is too large, too slow or too deep."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._most_bytes, self._seconds = settings.most_body_bytes, settings.body_seconds
        self._held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body()
        try:
            if not await self._read(scope, receive, body):
                return  # the client has gone
            if b"\0" in body.bytes():  # UTF-16, in which `json_depth` does not know strings
                raise bad_request("the body is not valid JSON in UTF-8")
            if json_depth(body.bytes()) > MOST_JSON_DEPTH:
                raise bad_request(f"the body is nested more than {MOST_JSON_DEPTH} levels deep")
            await self._app(scope, _replay(body.bytes(), receive), send)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        finally:
            self._held -= body.size

    async def _read(self, scope: Scope, receive: Receive, body: _Body) -> bool:
        try:
            return await asyncio.wait_for(self._read_all(scope, receive, body), self._seconds)
        except asyncio.TimeoutError:
            message = f"the body has not come within {self._seconds:g} seconds"
            raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None

    async def _read_all(self, scope: Scope, receive: Receive, body: _Body) -> bool:
        """Read a body; return whether all of it has come before the client has left."""
        announced = Headers(scope=scope).get("content-length", "0")
        too_large = not announced.isdigit() or int(announced[:20]) > self._most_bytes
        discarded, more = 0, True
        while more and discarded <= _MOST_DISCARDED_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            part, more = message.get("body", b""), message.get("more_body", False)
            too_large = too_large or body.size + len(part) > self._most_bytes
            if too_large:
                discarded += len(part)
            else:
                self._hold(body, part)
        if too_large:
            reason = f"the body has more than {self._most_bytes} bytes"
            raise ApiError(413, reason, code="body_too_large", headers={"Connection": "close"})
        return True

    def _hold(self, body: _Body, part: bytes) -> None:
        """Add a part to a body; a 503 if all bodies together are too large."""
        if self._held + len(part) > _MOST_BODIES * self._most_bytes:
            headers = {"Connection": "close", "Retry-After": "1"}
            raise ApiError(503, "too many requests are being sent", type="unavailable_error", headers=headers)
        body.add(part)
        self._held += len(part)


class _Body:
    """A body, as far as it has come."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.size = 0

    def add(self, part: bytes) -> None:
        """Take the next part."""
        self._parts.append(part)
        self.size += len(part)

    def bytes(self) -> bytes:
        """Return all of it."""
        if len(self._parts) != 1:
            self._parts = [b"".join(self._parts)]
        return self._parts[0]


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
    """Return how deep the brackets of a JSON text are nested; its strings do not count.

    Takes a time in proportion to the text, whatever it is: this is the first look at what a client sends.
    """
    if body.count(b"[") + body.count(b"{") <= MOST_JSON_DEPTH:
        return 0
    characters = np.frombuffer(body, np.uint8)
    inside = _in_strings(characters)
    opening = ((characters == ord("[")) | (characters == ord("{"))) & ~inside
    closing = ((characters == ord("]")) | (characters == ord("}"))) & ~inside
    return int(np.cumsum(opening.view(np.int8) - closing.view(np.int8), dtype=np.int32).max(initial=0))


def _in_strings(characters: np.ndarray) -> np.ndarray:
    """Tell of each character, uint8, whether it stands in a string: behind an odd number of quotes, escaped ones aside.

    An escaped quote has an odd number of backslashes in front of it.
    """
    quotes = np.flatnonzero(characters == ord('"'))
    others = np.flatnonzero(characters != ord("\\"))  # the last of them in front of a quote ends its backslashes
    before = np.searchsorted(others, quotes) - 1
    last = np.where(before >= 0, others[before], -1)
    borders = np.zeros(len(characters), np.int8)
    borders[quotes[(quotes - last) % 2 == 1]] = 1
    return np.cumsum(borders, dtype=np.int32) % 2 == 1

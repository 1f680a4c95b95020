"""HTTP/1.1 of uvicorn, with limits on slow clients and on how many there are, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from tritgguf.serving.errors import bad_request
from tritgguf.serving.responses import dump
from tritgguf.serving.settings import ServerSettings


class GuardedProtocol(H11Protocol):
    """Closes connections that send no complete request head in time, or do not read what is sent to them.

    Attributes:
        settings: the server's; `with_settings` returns a class that has them.

    """

    settings = ServerSettings()
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    @classmethod
    def with_settings(cls, settings: ServerSettings) -> type[GuardedProtocol]:
        """Return the class for a server with these settings; uvicorn makes the objects."""
        return type(cls.__name__, (cls,), {"settings": settings})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.most_connections:
            transport.abort()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop("_head_timer")
        self._stop("_write_timer")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take data; a request's head has to be complete some time after its first byte."""
        if self._head_timer is None and self._is_between_requests():
            self._await_head()
        super().data_received(data)
        if not self._is_between_requests():
            self._stop("_head_timer")

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.settings.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self._stop("_write_timer")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; behind a request that is being answered, just end."""
        if self._is_between_requests():
            body = dump(bad_request("this is not a valid HTTP request", code="invalid_http").as_dict())
            head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode("ascii"))
        self.transport.close()

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.settings.body_seconds, self.transport.abort)

    def _stop(self, name: str) -> None:
        timer: Any = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)

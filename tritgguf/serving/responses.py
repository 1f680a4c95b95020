"""How answers are sent: JSON, or a stream of events, while a client that leaves, a timeout or a shutdown ends them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tritgguf.serving.errors import ApiError, shutdown_error, timeout_error
from tritgguf.serving.service import Service

_LOGGER = logging.getLogger(__name__)
_CLIENT_CLOSED_REQUEST = 499  # nginx's status; nobody reads it
T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has closed the connection before its answer was complete."""


def dump(value: Any) -> str:
    """Return JSON in ASCII, so that any text of a client or a model can be sent, lone surrogates included."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


class JsonResponse(Response):
    """An answer in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return dump(content).encode("ascii")


def error_response(error: ApiError) -> JsonResponse:
    """Return an error in OpenAI's shape."""
    return JsonResponse(error.as_dict(), error.status, headers=error.headers)


def client_gone_response() -> Response:
    """Return what ends a request that nobody waits for any more."""
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


class EventStream(Response):
    """Server-sent events, a JSON object each, and [DONE] at the end; an error becomes an event."""

    media_type = "text/event-stream"

    def __init__(
        self, service: Service, events: AsyncGenerator[Mapping[str, Any], None], on_close: Callable[[], None]
    ) -> None:
        """Send `events`; `on_close` is called when the last is sent, or nobody reads them any more."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service, self._events, self._on_close = service, events, on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await run_guarded(self._send_events(send), receive, self._service)
            except ClientGoneError:
                return
            except Exception as error:
                public = self._service.public_error(error)
                if public.status == 500:
                    _LOGGER.error("an answer has failed", exc_info=error)
                await _send_event(send, dump(public.as_dict()))
            await _send_event(send, "[DONE]")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._on_close()

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await _send_event(send, dump(event))


async def _send_event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode("ascii"), "more_body": True})


async def run_guarded(work: Coroutine[Any, Any, T], receive: Receive, service: Service) -> T:
    """Run a coroutine to its end and return its result.

    It is cancelled, and ClientGoneError or ApiError raised, when the client leaves, when it takes longer than a request
    may, or when the server ends.
    """
    task = asyncio.create_task(work)
    gone, cut = asyncio.create_task(_disconnected(receive)), asyncio.create_task(service.cut.wait())
    try:
        waits: set[asyncio.Task[Any]] = {task, gone, cut}
        done, _ = await asyncio.wait(waits, timeout=service.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if gone in done:
            raise ClientGoneError
        raise shutdown_error() if cut in done else timeout_error(service.settings.timeout)
    finally:
        for other in (task, gone, cut):
            other.cancel()
        await asyncio.gather(task, gone, cut, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""Running the application: the socket, the signals, and an end within a bound."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from tritgguf.generation.loaded_model import LoadedModel
from tritgguf.serving.address import listen
from tritgguf.serving.app import create_app
from tritgguf.serving.http_protocol import GuardedProtocol
from tritgguf.serving.service import Service
from tritgguf.serving.settings import ServerSettings

_SECONDS_AFTER_CUT = 3.0  # for the last events of answers that were cut
_KEEP_ALIVE_SECONDS = 30


def serve(
    model: LoadedModel, settings: ServerSettings, bound: socket.socket, on_start: Callable[[], None] | None = None
) -> None:
    """Serve a model until a signal ends it: SIGTERM, or SIGINT (Ctrl-C).

    Then no more requests are taken, those that run may go on for `settings.shutdown_seconds` and are cut then.
    `on_start` is called when the server answers. Raises TritGgufError where another server has the address.
    """
    listen(bound)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    gc.freeze()  # the model's objects stay; collections need not look at them
    Server(model, settings, on_start).run(sockets=[bound])


class Server(uvicorn.Server):
    """Serves a model; ends as `serve` says, without raising the signal again."""

    def __init__(
        self, model: LoadedModel, settings: ServerSettings, on_start: Callable[[], None] | None = None
    ) -> None:
        """Make a server; `run` takes the socket, and `on_start` is called when it listens."""
        app = create_app(model, settings)
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=GuardedProtocol.with_settings(settings),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(settings.shutdown_seconds + _SECONDS_AFTER_CUT) + 1,
        )
        super().__init__(config)
        self.service: Service = app.state.service
        self._on_start = on_start
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self._on_start is not None:
            self._on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals as long as the server runs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second signal cuts what still runs."""
        again = self.should_exit
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.service.cut.set if again else self._close)

    def _close(self) -> None:
        self.service.closing = True
        assert self._loop is not None
        self._loop.call_later(self.service.settings.shutdown_seconds, self.service.cut.set)

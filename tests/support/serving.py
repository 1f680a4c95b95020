"""A server in a thread of the test's process, on a free port, and clients of it."""

from __future__ import annotations

import json
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import httpx
import numpy as np
import openai
from scripted_model import ScriptedModel, scripted

from tritgguf.generation.engine import Engine
from tritgguf.generation.loaded_model import LoadedModel
from tritgguf.generation.scheduler import Budget
from tritgguf.runtime.kv_pool import KVPool
from tritgguf.runtime.token_batch import TokenBatch
from tritgguf.serving.address import listening_socket, url_of
from tritgguf.serving.server import Server
from tritgguf.serving.settings import ServerSettings

MOST_SECONDS = 120.0  # a hang, on any machine


class RunningServer:
    """A server that runs.

    Attributes:
        url: where it listens.
        service: its state.
        connections: of its clients.
        http: a client.

    """

    def __init__(self, url: str, server: Server) -> None:
        self.url, self.service = url, server.service
        self.connections = server.server_state.connections
        self._server = server
        self.http = httpx.Client(base_url=url, timeout=MOST_SECONDS)

    @property
    def openai(self) -> openai.OpenAI:
        """OpenAI's client, which does not try again."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=MOST_SECONDS)

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Send a body as JSON."""
        return self.http.post(path, json=body)

    def error(self, path: str, **body: Any) -> dict[str, Any]:
        """Send a body that is refused with a 400; return the error."""
        response = self.post(path, **body)
        assert response.status_code == 400, response.text
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """Send a body and return the events of the streamed answer."""
        response = self.http.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
        assert data[-1] == "[DONE]"
        return [json.loads(line) for line in data[:-1]]

    def connect(self) -> socket.socket:
        """Return a connection."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return socket.create_connection((host, int(port)), timeout=MOST_SECONDS)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so, and fail if it never is."""
        deadline = time.monotonic() + MOST_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it does not come"
            time.sleep(0.005)

    def end(self) -> None:
        """Tell the server to end, as a signal does."""
        self._server.handle_exit(signal.SIGTERM, None)

    def check_idle(self) -> None:
        """Wait until nothing runs, and assert that nothing is left of what ran."""
        thread = self.service.engine_thread
        self.wait_until(lambda: not self.service.requests and not thread.jobs and not thread.engine.has_work)
        thread.engine.check()
        assert thread.engine.pool.free_sequences == thread.engine.parallel


@contextmanager
def running_server(model: LoadedModel, **settings: Any) -> Iterator[RunningServer]:
    """Serve a model as long as the block runs; afterwards nothing may be left of its requests."""
    bound, started = listening_socket("127.0.0.1", 0), threading.Event()
    server = Server(model, ServerSettings(port=0, **settings), started.set)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    assert started.wait(MOST_SECONDS)
    running = RunningServer(url_of(bound), server)
    try:
        yield running
        if not server.service.closing:
            running.check_idle()
    finally:
        running.http.close()
        server.should_exit = True
        thread.join(MOST_SECONDS)
        assert not thread.is_alive()


def request_bytes(path: str, body: bytes, *headers: str, host: str = "localhost", length: int | None = None) -> bytes:
    """Return an HTTP request; `length` claims another length of the body."""
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class PacedModel(ScriptedModel):
    """Generates the same token for ever, and takes its time for each forward pass.

    A test may hold it: then each pass waits until the test lets it go on, so nothing depends on how fast machines are.

    Attributes:
        seconds: what a pass takes.
        passes: the tokens that each pass had.

    """

    TOKEN = 40

    def __init__(self, seconds: float) -> None:
        super().__init__([])
        self.seconds = seconds
        self.passes: list[int] = []
        self._gate = threading.Condition()
        self._allowed: float = math.inf  # passes that may go on
        self._held = False

    def hold(self) -> None:
        """Let passes wait from now on."""
        with self._gate:
            self._allowed = 0

    def wait_until_held(self) -> None:
        """Wait until all passes that may go on have ended, and the next one waits."""
        with self._gate:
            assert self._gate.wait_for(lambda: self._held and not self._allowed, MOST_SECONDS), "no pass has begun"

    def let(self, passes: float = math.inf) -> None:
        """Let so many passes go on that wait or will wait."""
        with self._gate:
            self._allowed += passes
            self._gate.notify_all()

    def forward(
        self, batch: TokenBatch, kv: KVPool, logits: np.ndarray | None, hidden: np.ndarray | None = None
    ) -> None:
        with self._gate:
            self._held = True
            self._gate.notify_all()
            assert self._gate.wait_for(lambda: self._allowed >= 1, MOST_SECONDS), "the test holds this pass for ever"
            self._held = False
            self._allowed -= 1
        time.sleep(self.seconds)
        self.passes.append(len(batch.tokens))
        self.script = [self.TOKEN] * len(batch.outputs)
        super().forward(batch, kv, logits, hidden)


def paced(
    seconds: float, *, context: int = 2000, parallel: int = 2, budget: Budget | None = None, held: bool = False
) -> Any:
    """Return a LoadedModel with a PacedModel as its attribute `model`, which may be held from the start."""
    loaded = scripted([])
    loaded.model = model = PacedModel(seconds)
    if held:
        model.hold()
    loaded.engine = Engine(cast(Any, model), context=context, parallel=parallel, budget=budget)
    return loaded

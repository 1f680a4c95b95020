"""The state of a server: its model, the engine's thread, the queue, and what it has counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request

from tritgguf.generation.loaded_model import LoadedModel
from tritgguf.generation.request import RunningRequest
from tritgguf.serving.answers import Answer, Piece
from tritgguf.serving.engine_thread import EngineThread
from tritgguf.serving.errors import ApiError, from_exception, internal_error, shutdown_error
from tritgguf.serving.settings import ServerSettings
from tritgguf.serving.structured_output import Grammars
from tritgguf.serving.token_texts import TokenTexts
from tritgguf.version import __version__

_PIECES_AHEAD = 16  # of answers that a slow client has not taken yet
_MOST_RETRY_SECONDS = 60
_LARGE_BODY = 1 << 18  # bytes; tokenizing more takes long
_LARGE_BODIES_AT_ONCE = 2
T = TypeVar("T")


@dataclass
class Totals:
    """What requests that have ended add up to: tokens and seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    decode_seconds: float = 0.0
    answers: int = 0
    answer_seconds: float = 0.0

    def add(self, running: RunningRequest) -> None:
        """Count a request."""
        self.prompt_tokens += running.evaluated_prompt_tokens
        self.cached_tokens += running.cached
        self.prompt_seconds += running.prompt_seconds
        self.generated_tokens += len(running.tokens) - running.prompt_length
        self.decode_seconds += running.decode_seconds


class Service:
    """What the endpoints share.

    Attributes:
        model: the model.
        settings: the server's settings.
        alias: the model's name.
        started: when the server started, in seconds since 1970.
        engine_thread: runs the requests.
        totals: what has been counted.
        token_texts: texts of single tokens.
        grammars: forms of answers, compiled.
        room: limits the evaluations that only want log probabilities or embeddings.
        closing: whether the server is about to end: it takes no new requests.
        cut: set when requests that still run are to end.

    """

    def __init__(self, model: LoadedModel, settings: ServerSettings) -> None:
        self.model, self.settings = model, settings
        self.alias = settings.alias or model.path.stem
        self.started = int(time.time())
        self.engine_thread = EngineThread(model.engine)
        self.totals = Totals()
        self.closing = False
        self.cut = asyncio.Event()
        self.room = asyncio.Semaphore(model.engine.parallel)
        self._places = 0
        self._large_bodies = ThreadPoolExecutor(_LARGE_BODIES_AT_ONCE, thread_name_prefix="large-body")
        self.grammars = Grammars(model)
        self.token_texts = TokenTexts(model.tokenizer)
        self._private = {str(path): self.alias for path in (model.path.absolute(), model.path)}

    # -- the queue

    def take_place(self) -> Place:
        """Reserve a place for a request, which it must release; a 503 if the queue is full or the server ends."""
        if self.closing:
            raise shutdown_error()
        if self._places >= self.model.engine.parallel + self.settings.queue:
            message = f"{self._places} requests run or wait already; try again later"
            headers = {"Retry-After": str(self._retry_seconds())}
            raise ApiError(503, message, type="unavailable_error", code="queue_full", headers=headers)
        return Place(self)

    async def in_thread(self, request: Request, call: Callable[[], T]) -> T:
        """Return what a call returns that takes its time; the large bodies have threads of their own.

        So a short request does not wait for the long texts of others. One that nobody waits for any more, and that has
        not begun, is left out.
        """
        length = request.headers.get("content-length", "")
        is_small = length.isdigit() and int(length) <= _LARGE_BODY
        return await asyncio.get_running_loop().run_in_executor(None if is_small else self._large_bodies, call)

    @property
    def requests(self) -> int:
        """How many requests run or wait."""
        return self._places

    def _retry_seconds(self) -> int:
        """Return after which time a place should be free, by the answers until now."""
        average = self.totals.answer_seconds / self.totals.answers if self.totals.answers else 1.0
        return max(1, min(_MOST_RETRY_SECONDS, round(average * self._places / self.model.engine.parallel)))

    # -- answers

    async def merged(self, answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Piece | None], None]:
        """Generate answers side by side; yield the number of one and its next piece, and None when it has ended.

        No more of them run at once than the engine has sequences, so that a long list leaves room for other requests.
        An error ends all of them and is raised.
        """
        ready = asyncio.Queue[tuple[int, Piece | BaseException | None]](_PIECES_AHEAD)
        room = asyncio.Semaphore(self.model.engine.parallel)

        async def generate(number: int, answer: Answer) -> None:
            try:
                async with room, aclosing(answer.pieces(self.engine_thread)) as pieces:
                    async for piece in pieces:
                        await ready.put((number, piece))
                await ready.put((number, None))
            except Exception as error:
                await ready.put((number, error))

        tasks = [asyncio.create_task(generate(number, answer)) for number, answer in enumerate(answers)]
        running = len(tasks)
        try:
            while running:
                number, piece = await ready.get()
                if isinstance(piece, BaseException):
                    raise piece
                running -= piece is None
                yield number, piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for answer in answers:
                if answer.running is not None:
                    self.totals.add(answer.running)

    @property
    def file_bytes(self) -> int:
        """The size of the model's file; 0 if it is no longer there."""
        path = self.model.path
        return path.stat().st_size if path.exists() else 0

    @property
    def fingerprint(self) -> str:
        """What OpenAI's API calls a system fingerprint: this program's version."""
        return f"tritgguf-{__version__}"

    def public_error(self, error: BaseException) -> ApiError:
        """Return what a client is told of an error."""
        return from_exception(error, self.without_paths) or internal_error()

    def without_paths(self, message: str) -> str:
        """Return a message with the model's name in place of its path."""
        for text, replacement in self._private.items():
            message = message.replace(text, replacement)
        return message


class Place:
    """A place in the queue, held from a request's arrival until its answer is sent."""

    def __init__(self, service: Service) -> None:
        self._service, self._held, self._since = service, True, time.monotonic()
        service._places += 1

    def release(self) -> None:
        """Give the place back; more than once is harmless."""
        if self._held:
            self._held = False
            self._service._places -= 1
            self._service.totals.answers += 1
            self._service.totals.answer_seconds += time.monotonic() - self._since

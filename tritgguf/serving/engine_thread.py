"""The thread that runs forward passes while there is work, and the way of its results to the event loop.

HTTP never waits for a forward pass and never delays one: the event loop submits and cancels requests without a lock
that a pass holds, and the thread tells the loop of a pass's tokens by a single callback, of which at most one waits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator

from tritgguf.generation.engine import Engine
from tritgguf.generation.request import Request, RunningRequest

_LOGGER = logging.getLogger(__name__)


class EngineJob:
    """A request in the engine, as the event loop sees it; its methods are called in the loop."""

    def __init__(self, owner: EngineThread, running: RunningRequest) -> None:
        self.running = running
        self._owner = owner
        self._progress = asyncio.Event()

    async def tokens(self) -> AsyncGenerator[list[int], None]:
        """Yield the generated tokens, all that have come since the last time; raise the error that ended the request.

        The request is cancelled when the iteration ends early.
        """
        try:
            while True:
                ended = self.running.ended  # before the tokens are fetched, so that none is missed
                if new := self._fetch():
                    yield new
                elif ended:
                    break
                else:
                    await self._progress.wait()
                    self._progress.clear()
        finally:
            self.cancel()
        if isinstance(error := self.running.error, Exception):
            raise error
        if error is not None:  # such as a library's panic, which nobody on the way would catch
            raise RuntimeError("a request has failed") from error

    async def outputs(self) -> RunningRequest:
        """Wait for a request for logits or hidden states, and return it; raise the error that ended it."""
        async for _ in self.tokens():
            pass
        return self.running

    def cancel(self) -> None:
        """End the request if it has not ended: what it holds is free before the next forward pass."""
        self._owner._forget(self)

    def _fetch(self) -> list[int]:
        generated = self.running.generated
        return [generated.popleft() for _ in range(len(generated))]


class EngineThread:
    """Runs an engine's requests in a thread of its own.

    Attributes:
        engine: what runs.
        passes: how many forward passes there were.
        busy: the requests that ran in them, added up.
        jobs: those that have not ended, and those whose end nobody has seen yet.

    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.passes = 0
        self.busy = 0
        self.jobs: set[EngineJob] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work = threading.Condition()
        self._stopping = False
        self._announced = threading.Event()  # a callback waits in the loop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread; called in the event loop that gets the results."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, request: Request) -> EngineJob:
        """Queue a request, in the event loop; raises as `Engine.submit` does."""
        job = EngineJob(self, self.engine.submit(request))
        self.jobs.add(job)
        with self._work:
            self._work.notify()
        return job

    async def stop(self, seconds: float) -> None:
        """End all requests and the thread; wait so long for the forward pass that runs."""
        for job in list(self.jobs):
            self._forget(job)
        with self._work:
            self._stopping = True
            self._work.notify()
        await asyncio.to_thread(self._thread.join, seconds)

    @property
    def waiting(self) -> int:
        """How many requests have not begun."""
        return max(0, len(self.jobs) - len(self.engine.running))

    def _forget(self, job: EngineJob) -> None:
        if not job.running.ended:
            job.running.cancelled = True
            with self._work:
                self._work.notify()
        self.jobs.discard(job)

    def _run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._stopping or self.engine.has_work)
                if self._stopping:
                    return
            try:
                self.engine.step()
            except BaseException as error:  # a library's panic too: without the thread, nothing is ever answered
                _LOGGER.exception("a forward pass failed")
                for running in self.engine.running:
                    running.error = running.error or error
            self.passes += 1
            self.busy += len(self.engine.running)
            self._announce()

    def _announce(self) -> None:
        """Wake the loop, unless it is about to look anyway."""
        if self._announced.is_set() or self._loop is None:
            return
        self._announced.set()
        try:
            self._loop.call_soon_threadsafe(self._wake_jobs)
        except RuntimeError:  # the loop has been closed
            self._stopping = True

    def _wake_jobs(self) -> None:
        self._announced.clear()  # first: what comes from now on needs another callback
        for job in self.jobs:
            if job.running.generated or job.running.ended:
                job._progress.set()

"""The engine: many requests of any threads through one model.

Whoever waits for a result runs forward passes, for all requests, unless another thread does so already. So there is no
thread of its own, and nothing runs while nobody waits. One thread at a time owns the model and the pool.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from cpu_kernels.threads.thread_pool import interrupts_deferred
from tritgguf.errors import BadRequestError, ContextFullError
from tritgguf.generation.engine_core import EngineCore
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.scheduler import Budget
from tritgguf.runtime.kv_pool import pages_of
from tritgguf.runtime.model import Model

_SECONDS_OF_WAITING = 1.0


class Engine:
    """Runs requests side by side; all methods may be called from any thread.

    Attributes:
        model: what runs them.
        context: tokens that a request's prompt and answer may have together.
        parallel: how many requests run at once; others wait.
        pool: keys and values.

    """

    def __init__(
        self,
        model: Model,
        *,
        context: int,
        parallel: int = 16,
        pages: int | None = None,
        cache_type: str | None = None,
        budget: Budget | None = None,
    ) -> None:
        """Make an engine; `pages` (of keys and values) and `cache_type` as in `Model.new_kv_pool`.

        Raises ValueError for fewer pages than a single request may need.
        """
        if pages is not None and pages < pages_of(context) + 1:
            raise ValueError("the pool is smaller than a single request may become")
        self.model, self.context, self.parallel = model, context, parallel
        self.pool = model.new_kv_pool(context=context, sequences=parallel, pages=pages, cache_type=cache_type)
        self._core = EngineCore(model, self.pool, budget or Budget())
        self._submitted: deque[RunningRequest] = deque()
        self._stepping = threading.Lock()  # held by the thread that owns the core, the model and the pool
        self._progress = threading.Condition()

    def submit(self, request: Request) -> RunningRequest:
        """Queue a request; BadRequestError or ContextFullError for a prompt that is empty, too long, or unknown."""
        if not request.prompt:
            raise BadRequestError("the prompt is empty; give the model something to continue")
        if len(request.prompt) > self.context:
            raise ContextFullError(
                f"the prompt has {len(request.prompt)} tokens, the context holds {self.context}; shorten it or raise -c"
            )
        self.model.check_tokens(np.asarray(request.prompt, np.int64))
        running = RunningRequest(request, list(request.prompt))
        self._submitted.append(running)
        self._announce()
        return running

    def cancel(self, request: RunningRequest) -> None:
        """End a request; what it holds is free before the next forward pass."""
        request.cancelled = True
        if self._stepping.acquire(blocking=False):
            try:
                self._core.remove_ended()
            finally:
                self._stepping.release()
        self._announce()

    def tokens(self, request: RunningRequest) -> Iterator[int]:
        """Yield a request's tokens as they are generated; raises the error that has ended it, if one has."""
        while True:
            self._run_until(lambda: bool(request.generated) or request.ended)
            if not request.generated:
                break
            yield request.generated.popleft()
        if request.error is not None:
            raise request.error

    def outputs(self, request: RunningRequest) -> np.ndarray:
        """Return a request's logits or hidden states, float32 [tokens, width]; raises the error that has ended it."""
        self._run_until(lambda: request.ended)
        if request.error is not None:
            raise request.error
        if request.outputs is None:
            raise BadRequestError("the request was cancelled")
        return request.outputs

    def step(self) -> bool:
        """Run one forward pass; return whether there was anything to do."""
        with interrupts_deferred(), self._stepping:
            did = self._step()
        self._announce()
        return did

    def clear_prefix_cache(self) -> None:
        """Forget the keys and values of requests that have ended."""
        with self._stepping:
            self._core.prefix_cache.clear()

    def check(self) -> None:
        """Raise AssertionError unless every page is free or held once by each of its owners."""
        with self._stepping:
            self._core.remove_ended()
            self.pool.check(self._core.prefix_cache.held_pages())

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._submitted or self._core.waiting or self._core.running)

    def _announce(self) -> None:
        with self._progress:
            self._progress.notify_all()

    def _step(self) -> bool:
        while self._submitted:
            self._core.waiting.append(self._submitted.popleft())
        return self._core.step()

    def _run_until(self, ready: Callable[[], bool]) -> None:
        """Run forward passes, or wait while another thread does, until `ready`."""
        while not ready():
            if not self._stepping.acquire(blocking=False):
                with self._progress:
                    self._progress.wait_for(lambda: ready() or not self._stepping.locked(), _SECONDS_OF_WAITING)
                continue
            try:
                with interrupts_deferred():
                    did = ready() or self._step()
            finally:
                self._stepping.release()
                self._announce()
            if not did and not ready():
                raise RuntimeError("a request neither waits nor runs")

"""The engine: many requests of any threads through one model.

Whoever waits for a result runs forward passes, for all requests, unless another thread does so already. So there is no
thread of its own, and nothing runs while nobody waits. One thread at a time owns the model and the pool.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cpu_kernels.threads.thread_pool import interrupts_deferred
from tritgguf.errors import BadRequestError
from tritgguf.generation.engine_core import EngineCore
from tritgguf.generation.request import Request, RunningRequest, check_prompt_length
from tritgguf.generation.scheduler import Budget
from tritgguf.generation.speculation import Speculation
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
        speculation: what drafts tokens; None for nothing.

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
        speculation: Speculation | None = None,
    ) -> None:
        """Make an engine; `pages` (of keys and values) and `cache_type` as in `Model.new_kv_pool`.

        Raises ValueError for fewer pages than a single request may need.
        """
        if pages is not None and pages < pages_of(context) + 1:
            raise ValueError("the pool is smaller than a single request may become")
        self.model, self.context, self.parallel = model, context, parallel
        self.pool = model.new_kv_pool(context=context, sequences=parallel, pages=pages, cache_type=cache_type)
        self.speculation = speculation
        self._core = EngineCore(model, self.pool, budget or Budget(), speculation)
        self._submitted: deque[RunningRequest] = deque()
        self._stepping = threading.Lock()  # held by the thread that owns the core, the model and the pool
        self._progress = threading.Condition()
        self._owner: int | None = None  # the thread that runs a forward pass
        self._process = os.getpid()

    def submit(self, request: Request) -> RunningRequest:
        """Queue a request; raises as `check_request` does."""
        self.check_request(request)
        running = RunningRequest(request, list(request.prompt))
        self._submitted.append(running)
        self._announce()
        return running

    def check_request(self, request: Request) -> None:
        """Raise BadRequestError or ContextFullError for a request that cannot be answered.

        Its prompt is empty, too long, or has a token that does not exist, or its outputs begin outside of the prompt.
        """
        if not request.prompt:
            raise BadRequestError("the prompt is empty; give the model something to continue")
        if not _is_whole(request.first_output):
            raise BadRequestError(f"the first output must be a whole number, not {request.first_output!r:.60}")
        if request.max_tokens is not None and not (_is_whole(request.max_tokens) and request.max_tokens >= 0):
            raise BadRequestError(f"max_tokens must be a whole number, 0 or more, not {request.max_tokens!r:.60}")
        if not all(map(_is_whole, request.prompt)):
            raise BadRequestError("a prompt consists of token ids, which are whole numbers")
        check_prompt_length(len(request.prompt), self.context)
        self.model.check_tokens(np.asarray(request.prompt))
        if not 0 <= request.first_output < len(request.prompt):
            raise BadRequestError(f"the first output must be one of tokens 0 to {len(request.prompt) - 1}")

    def cancel(self, request: RunningRequest) -> None:
        """End a request; what it holds is free before the next forward pass."""
        request.cancelled = True
        with interrupts_deferred():
            if self._stepping.acquire(blocking=False):
                try:
                    self._take_submitted()
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
        try:
            self._run_until(lambda: request.ended)
        except BaseException:  # Ctrl-C, for example: nobody wants the outputs any more
            self.cancel(request)
            raise
        if request.error is not None:
            raise request.error
        if request.outputs is None:
            raise BadRequestError("the request was cancelled")
        return request.outputs

    def step(self) -> bool:
        """Run one forward pass; return whether there was anything to do."""
        self._check_owner()
        with interrupts_deferred(), self._stepping:
            did = self._step()
        self._announce()
        return did

    def clear_prefix_cache(self) -> None:
        """Forget the keys and values of requests that have ended."""
        with self._stepping:
            self._core.prefix_cache.clear()

    def forget_prefix(self, tokens: Sequence[int]) -> None:
        """Forget the keys and values of a prompt that has ended, but for what longer ones begin with.

        Their memory then holds the next prompts, instead of new memory.
        """
        with self._stepping:
            self._core.prefix_cache.forget(tokens)

    def check(self) -> None:
        """Raise AssertionError unless every page is free or held once by each of its owners, and every state too."""
        with self._stepping:
            self._take_submitted()
            self._core.remove_ended()
            self.pool.check(self._core.prefix_cache.held_pages())
            if self.pool.states is not None:
                self.pool.states.check(self._core.held_states())

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._submitted or self._core.waiting or self._core.running)

    @property
    def running(self) -> tuple[RunningRequest, ...]:
        """The requests that have a sequence, in the order of their admission; a snapshot."""
        return tuple(self._core.running)

    def _announce(self) -> None:
        with self._progress:
            self._progress.notify_all()

    def _take_submitted(self) -> None:
        while self._submitted:
            self._core.waiting.append(self._submitted.popleft())

    def _step(self) -> bool:
        self._owner = threading.get_ident()
        try:
            self._take_submitted()
            return self._core.step()
        finally:
            self._owner = None

    def _check_owner(self) -> None:
        """Raise RuntimeError where waiting for a forward pass would never end."""
        if self._owner == threading.get_ident():
            raise RuntimeError("a sampler cannot wait for the engine that calls it")
        if self._process != os.getpid() and self._stepping.locked():
            raise RuntimeError("the process was forked during a forward pass; load the model again")

    def _run_until(self, ready: Callable[[], bool]) -> None:
        """Run forward passes, or wait while another thread does, until `ready`."""
        self._check_owner()
        while not ready():
            with interrupts_deferred():  # Ctrl-C just behind `acquire` would leave the lock taken
                did = self._try_step(ready)
            if did is None:
                with self._progress:
                    self._progress.wait_for(lambda: ready() or not self._stepping.locked(), _SECONDS_OF_WAITING)
            elif not did and not ready():
                raise RuntimeError("a request neither waits nor runs")

    def _try_step(self, ready: Callable[[], bool]) -> bool | None:
        """Run a forward pass, unless `ready` by now; return whether there was one to run, None if another thread is."""
        if not self._stepping.acquire(blocking=False):
            return None
        try:
            return ready() or self._step()
        finally:
            self._stepping.release()
            self._announce()


def _is_whole(value: object) -> bool:
    """Tell whether a value is a whole number, of NumPy perhaps, and no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)

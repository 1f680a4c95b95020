"""The thread pool that kernels run on.

A parallel kernel releases the GIL and takes `thread` and `threads` as its last two arguments, which select its share
of the work; `run` calls it once on every thread. The threads are Python's: a launch takes a few tens of microseconds,
which is fast enough because `decode` needs one per token. They sleep while they wait. OpenMP's threads spin, which
slows everything down a hundredfold as soon as another program needs a core.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

from cpu_kernels.compilation.kernel import Kernel, Memo, compilation_listeners
from cpu_kernels.simd import instruction_set
from cpu_kernels.threads.cores import physical_cores

_POOLS: weakref.WeakSet[ThreadPool] = weakref.WeakSet()


class ThreadPool:
    """A fixed number of threads, including the caller's, and the instruction set of the kernels that they run.

    A lock lets one caller run at a time: two kernels at once would wait for each other's threads at their barriers.
    """

    def __init__(self, threads: int | None = None, *, isa: str | None = None) -> None:
        """Use `threads` threads; None takes one per physical core. `isa` is the name for `instruction_set.choose`."""
        self.threads = physical_cores() if threads is None else max(1, threads)
        self.isa_name = isa
        self._memo: Memo = {}
        self._start()
        _POOLS.add(self)

    def _start(self) -> None:
        """Make the lock and the other threads, which the system starts with their first kernel."""
        self._lock = threading.Lock()
        self._others = ThreadPoolExecutor(max(1, self.threads - 1), thread_name_prefix="kernel")

    @functools.cached_property
    def isa(self) -> tuple[int, ...]:
        """The instruction set, as kernels take it; raises ValueError as `instruction_set.choose` does."""
        return instruction_set.chosen(self.isa_name)

    def run(self, kernel: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call kernel(*arguments, thread, threads) on every thread; return the results in the threads' order.

        Ctrl-C takes effect after all threads have returned: if one were not started, the others would wait at the
        barrier forever. Nobody waits for a single thread, and deferring takes longer than a small kernel.
        """
        deferred = interrupts_deferred() if self.threads > 1 else nullcontext()
        with deferred, self._lock:
            if isinstance(kernel, Kernel):
                call = kernel.bind((*arguments, 0, self.threads), self._memo).run
            else:
                call = functools.partial(_call, kernel, arguments, self.threads)
            others = [self._others.submit(call, thread) for thread in range(1, self.threads)]
            try:
                first = call(0)
            finally:
                results = [other.result() for other in others]
        return [first, *results]


def _call(kernel: Callable[..., Any], arguments: tuple[Any, ...], threads: int, thread: int) -> Any:
    return kernel(*arguments, thread, threads)


def _start_after_fork() -> None:
    """Give pools new threads in a forked process, which has only the thread that forked."""
    for pool in _POOLS:
        pool._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_after_fork)


@contextmanager
def interrupts_deferred(when: Callable[[FrameType | None], bool] = lambda frame: True) -> Iterator[None]:
    """Defer Ctrl-C until the end of the block, in frames for which `when` is true; only affects the main thread."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if when(frame):
            pending.append((number, frame))
        else:
            handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pending:
            handler(*pending[0])


class CompilingThreadPool(ThreadPool):
    """Compiles kernels, or loads them from the cache, instead of running them."""

    def run(self, kernel: Any, *arguments: Any) -> list[Any]:
        """Make `kernel` ready for arguments of these types."""
        kernel.load(*arguments, 0, 1)
        return []


@contextmanager
def announcing_compilation(announce: Callable[[], None]) -> Iterator[None]:
    """Call `announce` once if a kernel is compiled in the block; loading from the cache does not count."""
    announced = False

    def listen() -> None:
        nonlocal announced
        if not announced:
            announced = True
            announce()

    compilation_listeners.append(listen)
    try:
        yield
    finally:
        compilation_listeners.remove(listen)


@functools.cache
def default_thread_pool() -> ThreadPool:
    """Return the default thread pool, with one thread per physical core."""
    return ThreadPool()

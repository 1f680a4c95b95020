"""The threads that kernels run on.

A parallel kernel is compiled without the interpreter's lock and takes its share of the work as its last two
arguments, `thread` and `threads`; `run` calls it once on every thread. Python's own threads do this as fast as
Numba's parallel loops where it matters (one launch is a few tens of microseconds, and `decode` needs one per token),
and they sleep while they wait: OpenMP's spin, which stalls everything a hundredfold as soon as another program
wants a core.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numba
from numba.core.event import Listener, install_listener

from cpu_kernels.simd import instruction_set
from cpu_kernels.threads.cores import physical_cores


class ThreadPool:
    """A fixed number of threads, the caller's among them, and the instruction set of what they run.

    Callers of several threads take turns: kernels of two of them at once would wait for each other at their barriers.
    """

    def __init__(self, threads: int | None = None, *, isa: str | None = None) -> None:
        """Start with `threads` threads; None stands for the physical cores. `isa` as in `instruction_set.choose`."""
        self.threads = physical_cores() if threads is None else max(1, threads)
        self.isa_name, self._one_at_a_time = isa, threading.Lock()
        self._others = ThreadPoolExecutor(max(1, self.threads - 1), thread_name_prefix="kernel")

    @functools.cached_property
    def isa(self) -> tuple[int, ...]:
        """The instruction set, as kernels take it; ValueError as `instruction_set.choose` raises it."""
        return instruction_set.chosen(self.isa_name)

    def run(self, kernel: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call kernel(*arguments, thread, threads) on every thread; return the results in the threads' order.

        Ctrl-C takes effect when all have returned: threads that wait for one another at a barrier would wait for
        ever if one of them were not started.
        """
        with interrupts_deferred(), self._one_at_a_time:
            others = [
                self._others.submit(kernel, *arguments, thread, self.threads) for thread in range(1, self.threads)
            ]
            try:
                first = kernel(*arguments, 0, self.threads)
            finally:
                results = [other.result() for other in others]
        return [first, *results]


@contextmanager
def interrupts_deferred(when: Callable[[FrameType | None], bool] = lambda frame: True) -> Iterator[None]:
    """Hold back Ctrl-C, in frames where `when` says so, until the block has ended; only the main thread sees it."""
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


def _called_by_llvm(frame: FrameType | None) -> bool:
    """Say whether LLVM called this frame or one above it, to ask for an object or to hand one over.

    What is raised there is printed by ctypes and forgotten: a Ctrl-C would be lost.
    """
    while frame is not None:
        if frame.f_code.co_name.startswith("_raw_object_cache"):  # llvmlite.binding.ExecutionEngine
            return True
        frame = frame.f_back
    return False


class CompilingThreadPool(ThreadPool):
    """Compiles what it is asked to run, or loads it from the cache, and runs nothing."""

    def run(self, kernel: Any, *arguments: Any) -> list[Any]:
        """Make `kernel` ready for arguments of these types."""
        with interrupts_deferred(when=_called_by_llvm):
            kernel.compile(tuple(numba.typeof(argument) for argument in (*arguments, 0, 1)))
        return []


@contextmanager
def announcing_compilation(announce: Callable[[], None]) -> Iterator[None]:
    """Call `announce` once if a kernel is really compiled in the block, not merely loaded from the cache."""
    announced = False

    class Announcer(Listener):
        def on_start(self, event: Any) -> None:
            nonlocal announced
            if not announced:
                announced = True
                announce()

        def on_end(self, event: Any) -> None:
            pass

    with install_listener("numba:compile", Announcer()):
        yield


@functools.cache
def default_thread_pool() -> ThreadPool:
    """Return the thread_pool of all physical cores, for callers that do not bring one."""
    return ThreadPool()

"""The threads that kernels run on.

A parallel kernel is compiled without the interpreter's lock and takes its share of the work as its last two
arguments, `thread` and `threads`; `run` calls it once on every thread. Python's own threads do this as fast as
Numba's parallel loops where it matters (one launch is a few tens of microseconds, and `decode` needs one per token),
and they sleep while they wait: OpenMP's spin, which stalls everything a hundredfold as soon as another program
wants a core.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numba
from numba.core.event import Listener, install_listener


def physical_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: physical ones where Linux tells, logical ones elsewhere.

    Two logical processors of one core count once, fast and slow cores alike; those that the process's affinity rules
    out do not count, and a control group's share of the processors is rounded down, because a thread that is stopped
    for having used it up keeps all others waiting. `root` is where /sys and /proc are.
    """
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    topology = [root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in allowed]
    try:
        cores = len({path.read_text() for path in topology})
    except OSError:
        cores = len(allowed)
    return max(1, int(min(cores, processor_share(root))))


def processor_share(root: Path = Path("/")) -> float:
    """Return how many processors' time Linux's control groups grant this process; infinity where there is no limit.

    Formats of the files: cgroups(7), and the kernel's documentation of `cpu.max` (version 2) and of
    `cpu.cfs_quota_us` (version 1). The limits of all ancestors hold.
    """
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return math.inf
    share = math.inf
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = mount / path.lstrip("/")
        for folder in (own, *own.parents):
            share = min(share, _share_of_group(folder))
            if folder == mount:
                break
    return share


def _share_of_group(folder: Path) -> float:
    """Return the processors that one control group may use; infinity for one that says nothing."""
    try:
        if (limit := folder / "cpu.max").exists():
            quota, period = limit.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return math.inf


class Crew:
    """A fixed number of threads, the caller's among them."""

    def __init__(self, threads: int | None = None) -> None:
        """Start with `threads` threads; None stands for the physical cores."""
        self.threads = physical_cores() if threads is None else max(1, threads)
        self._others = ThreadPoolExecutor(max(1, self.threads - 1), thread_name_prefix="kernel")

    def run(self, kernel: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call kernel(*arguments, thread, threads) on every thread; return the results in the threads' order.

        Ctrl-C takes effect when all have returned: threads that wait for one another at a barrier would wait for
        ever if one of them were not started.
        """
        with _interrupts_deferred():
            others = [
                self._others.submit(kernel, *arguments, thread, self.threads) for thread in range(1, self.threads)
            ]
            try:
                first = kernel(*arguments, 0, self.threads)
            finally:
                results = [other.result() for other in others]
        return [first, *results]


@contextmanager
def _interrupts_deferred(when: Callable[[FrameType | None], bool] = lambda frame: True) -> Iterator[None]:
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


class CompilingCrew(Crew):
    """Compiles what it is asked to run, or loads it from the cache, and runs nothing."""

    def run(self, kernel: Any, *arguments: Any) -> list[Any]:
        """Make `kernel` ready for arguments of these types."""
        with _interrupts_deferred(when=_called_by_llvm):
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
def default_crew() -> Crew:
    """Return the crew of all physical cores, for callers that do not bring one."""
    return Crew()

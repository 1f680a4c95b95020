"""Compile all kernels once, before anything needs them, on all cores, in processes of their own.

Numba's compiler holds the GIL, so threads would wait for one another. Each worker process compiles one kernel at a time
and leaves it in the cache, from where this process and all later ones load it. A file in the cache folder says that all
kernels of these sources, this processor and this instruction set are there.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numba

from cpu_kernels import kernel_cache
from cpu_kernels.simd import instruction_set
from cpu_kernels.simd.variants import name_of
from cpu_kernels.threads.bandwidth import read
from cpu_kernels.threads.cores import physical_cores

LAZY_VARIABLE = "TRITGGUF_LAZY_KERNELS"  # if set, kernels are compiled when they are first needed
Progress = Callable[[int, int], None]  # kernels that are compiled, and all kernels

# Each worker has half a gigabyte; more than this many gain nothing, because the largest kernel takes as long as all.
_MOST_WORKERS = 4


def precompile(isa: str | None = None, progress: Progress | None = None) -> bool:
    """Compile all kernels that are not in the cache yet; return whether there was anything to do.

    Nothing happens if no cache folder can be written, if `TRITGGUF_LAZY_KERNELS` is set, or if Python cannot be started
    again as a program: then kernels are compiled when they are first needed.

    Args:
        isa: as in `instruction_set.choose`.
        progress: called after each kernel.

    Raises:
        ValueError: as `instruction_set.choose` does.

    """
    folder = kernel_cache.folder_of(read)
    if folder is None or os.environ.get(LAZY_VARIABLE) or not sys.executable:
        return False
    number = instruction_set.choose(isa)
    mark = folder / f"kernels-{_fingerprint(number)}.complete"
    if mark.exists():
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(mark.with_suffix(".lock")):
            if mark.exists():  # another process was faster
                return False
            if _run_workers(name_of(number), progress or (lambda done, total: None)):
                mark.touch()
    except OSError:
        return False
    return True


def _fingerprint(isa: int) -> str:
    """Return what cached kernels depend on, as 16 hexadecimal digits."""
    from numba.core.registry import cpu_target

    codegen = cpu_target.target_context.codegen().magic_tuple()
    parts = (kernel_cache.sources_hash(), numba.__version__, sys.version, codegen, isa)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time into the block; on systems without file locks, all."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run_workers(isa: str, progress: Progress) -> bool:
    """Let worker processes compile all kernels; return whether they did."""
    from cpu_kernels.all_kernels import all_kernels

    total = len(all_kernels(instruction_set.chosen(isa)))
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    finished: queue.SimpleQueue[bool] = queue.SimpleQueue()
    for number in range(total):
        waiting.put(number)
    workers = [_start_worker(isa) for _ in range(min(_MOST_WORKERS, physical_cores()))]
    threads = [threading.Thread(target=_feed, args=(worker, waiting, finished), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        progress(0, total)
        for done in range(1, total + 1):
            if not finished.get():
                return False
            progress(done, total)
        return True
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _start_worker(isa: str) -> subprocess.Popen[str]:
    """Start a process that runs `_work`."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    program = f"from cpu_kernels import precompile; precompile._work({isa!r})"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), LAZY_VARIABLE: "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _feed(
    worker: subprocess.Popen[str], waiting: queue.SimpleQueue[int], finished: queue.SimpleQueue[bool]
) -> None:
    """Give a worker one kernel after the other."""
    assert worker.stdin is not None and worker.stdout is not None
    with contextlib.suppress(queue.Empty):
        while True:
            number = waiting.get_nowait()
            try:
                worker.stdin.write(f"{number}\n")
                worker.stdin.flush()
                finished.put(bool(worker.stdout.readline()))
            except (OSError, ValueError):  # the worker has died
                finished.put(False)
                return


def _work(isa: str) -> None:
    """Compile the kernels whose numbers come in through stdin; answer each with a line."""
    from cpu_kernels.all_kernels import all_kernels

    gc.disable()  # a sixth of the time
    kernels = list(all_kernels(instruction_set.chosen(isa)).items())
    for line in sys.stdin:
        kernel, signatures = kernels[int(line)]
        for signature in signatures:
            kernel.compile(signature)
        print(line, end="", flush=True)

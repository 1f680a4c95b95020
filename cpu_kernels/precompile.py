"""Compile all kernels once, before anything needs them, on all cores, in processes of their own.

Numba's compiler holds the GIL, so threads would wait for one another. Each worker process compiles one kernel at a time
and leaves it in the cache, from where this process and all later ones load it. A file in the cache folder says that all
kernels of these sources, this processor and this instruction set are there.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cpu_kernels.compilation import kernel_cache
from cpu_kernels.simd import instruction_set
from cpu_kernels.simd.variants import name_of
from cpu_kernels.threads.cores import physical_cores

LAZY_VARIABLE = "TRITGGUF_LAZY_KERNELS"  # if set, kernels are compiled when they are first needed
Progress = Callable[[int, int], None]  # work that is done, and all work
Display = Callable[[], AbstractContextManager[Progress]]  # shows the progress while it is entered

# Each worker has half a gigabyte; more than this many gain little, because the largest kernels take as long as all.
_MOST_WORKERS = 4
# About how many thirds of a second a version of a kernel takes; one for most. One worker compiles all versions of a
# kernel, because they have functions in common.
_WORK = {
    "decode_batch": 14,
    "multiply_rows_batch": 12,
    "decode": 11,
    "trit_gemm": 7,
    "attend_units": 4,
    "attend": 3,
    "_unpack_rows": 3,
    "multiply_half_rows": 3,
    "multiply_rows": 2,
    "quantize_columns": 2,
    "refine_columns": 2,
}


def precompile(isa: str | None, display: Display) -> bool:
    """Compile all kernels that are not in the cache yet; return whether there was anything to do.

    Nothing happens if no cache folder can be written, if `TRITGGUF_LAZY_KERNELS` is set, or if Python cannot be started
    again as a program: then kernels are compiled when they are first needed.

    Args:
        isa: as in `instruction_set.choose`.
        display: called if there is something to compile; shows the progress.

    Raises:
        ValueError: as `instruction_set.choose` does.

    """
    number = instruction_set.choose(isa)
    folder = kernel_cache.folder()
    if folder is None or os.environ.get(LAZY_VARIABLE) or not sys.executable:
        return False
    mark = (folder / kernel_cache.file_name("all", name_of(number))).with_suffix(".complete")
    if mark.exists():
        return False
    try:
        with locked(mark.with_suffix(".lock"), display):
            if mark.exists():  # another process has done it meanwhile
                return True
            kernel_cache.remove_old()
            with display() as progress:
                if _run_workers(name_of(number), progress):
                    mark.touch()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext) -> Iterator[None]:
    """Let one process at a time into the block, others meanwhile into `waiting`; on systems without file locks, all."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with waiting():
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run_workers(isa: str, progress: Progress) -> bool:
    """Let worker processes compile all kernels; return whether they did."""
    from cpu_kernels.all_kernels import all_kernels

    waiting: queue.SimpleQueue[tuple[int, int, int]] = queue.SimpleQueue()  # number, versions, work of each
    finished: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # work of a version; None: a worker has died
    kernels = all_kernels(instruction_set.chosen(isa))
    work = [_WORK.get(kernel.__name__, 1) for kernel in kernels]
    versions = [len(signatures) for signatures in kernels.values()]
    jobs = list(zip(range(len(kernels)), versions, work, strict=True))
    for job in sorted(jobs, key=lambda job: -job[1] * job[2]):
        waiting.put(job)
    total, done = sum(count * each for _, count, each in jobs), 0
    workers = [_start_worker(isa) for _ in range(min(_MOST_WORKERS, physical_cores()))]
    try:
        for worker in workers:
            threading.Thread(target=_feed, args=(worker, waiting, finished), daemon=True).start()
        progress(0, total)
        while done < total:
            step = finished.get()
            if step is None:
                return False
            done += step
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
    worker: subprocess.Popen[str],
    waiting: queue.SimpleQueue[tuple[int, int, int]],
    finished: queue.SimpleQueue[int | None],
) -> None:
    """Give a worker one kernel after the other."""
    assert worker.stdin is not None and worker.stdout is not None
    with contextlib.suppress(queue.Empty):
        while True:
            number, versions, work = waiting.get_nowait()
            try:
                worker.stdin.write(f"{number}\n")
                worker.stdin.flush()
                for _ in range(versions):
                    finished.put(work if worker.stdout.readline() else None)
            except (OSError, ValueError):  # the worker has died, or was killed
                finished.put(None)
                return


def _work(isa: str) -> None:
    """Compile the kernels whose numbers come in through stdin; answer with a line for each version."""
    from cpu_kernels.all_kernels import all_kernels
    from cpu_kernels.compilation.machine_code import make_functions_of_numba_inner

    gc.disable()  # a sixth of the time
    make_functions_of_numba_inner()  # a tenth
    kernels = list(all_kernels(instruction_set.chosen(isa)).items())
    for line in sys.stdin:
        kernel, signatures = kernels[int(line)]
        for signature in signatures:
            with contextlib.suppress(Exception):  # whatever Numba raises: whoever needs the kernel will see it
                if not kernel.is_cached(signature):
                    kernel.compile(signature)
            print(line, end="", flush=True)

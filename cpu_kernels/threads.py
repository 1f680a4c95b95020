"""How many threads the kernels run on."""

from __future__ import annotations

import os

import numba


def physical_cores() -> int:
    """Return the cores this process may use: physical ones where Linux tells, logical ones elsewhere."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                cores.add(file.read())
        except OSError:
            return len(allowed)
    return max(1, len(cores))


def use_threads(threads: int | None) -> int:
    """Set the number of threads that parallel kernels use from here on; None for the physical cores.

    More than the machine's logical cores are not available; the number in force is returned.
    """
    wanted = physical_cores() if threads is None else max(1, threads)
    count = min(wanted, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(count)
    return count

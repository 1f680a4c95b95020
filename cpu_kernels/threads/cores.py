"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


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

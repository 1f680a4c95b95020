"""The number of cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def physical_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: physical cores on Linux, logical processors elsewhere.

    Hyperthreads of one core count once, and fast and slow cores count alike. Processors outside the process's CPU
    affinity do not count. A CPU quota is rounded down, because a throttled thread makes all others wait at the
    barrier. `root` is the folder of /sys and /proc.
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
    return max(1, int(min(cores, cpu_quota(root))))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return the CPU quota of this process's control groups, in processors; infinity if there is none.

    The smallest quota of the group and its ancestors counts. File formats: cgroups(7), and the Linux kernel's
    documentation of `cpu.max` (version 2) and `cpu.cfs_quota_us` (version 1).
    """
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return math.inf
    quota = math.inf
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = mount / path.lstrip("/")
        for folder in (own, *own.parents):
            quota = min(quota, _quota_of_group(folder))
            if folder == mount:
                break
    return quota


def _quota_of_group(folder: Path) -> float:
    """Return the CPU quota of one control group, in processors; infinity if it sets none."""
    try:
        if (limit := folder / "cpu.max").exists():
            quota, period = limit.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # "max" is not a number
        return math.inf

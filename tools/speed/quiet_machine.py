"""The share of the machine that other programs use, and waiting until they are idle."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

QUIET = 0.1  # share of all cores' time that other programs may take
_POLL_SECONDS = 3.0


class Patience:
    """Waits for other programs to become idle, for a limited total time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def wait(self) -> None:
        """Return when the machine is quiet or the time is used up."""
        while self.seconds > 0:
            before = processor_seconds()
            time.sleep(_POLL_SECONDS)
            if share_of_others(before, processor_seconds()) <= QUIET:
                return
            self.seconds -= _POLL_SECONDS

    def accepts(self, disturbance: float, elapsed: float) -> bool:
        """Return whether a turn of `elapsed` seconds counts; a disturbed turn is repeated while there is time."""
        if disturbance <= QUIET or self.seconds <= 0:
            return True
        self.seconds -= elapsed
        return False


class ProcessorSeconds(NamedTuple):
    """Seconds so far: elapsed, busy time of all cores, and CPU time of this process and its children."""

    elapsed: float
    busy: float
    own: float


def processor_seconds() -> ProcessorSeconds:
    """Read the clocks; on systems other than Linux only the elapsed time.

    Source: proc(5), /proc/stat. Time stolen by a hypervisor counts as busy.
    """
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return ProcessorSeconds(time.perf_counter(), 0.0, 0.0)
    user, nice, system, _idle, _wait, irq, soft_irq, stolen = map(int, fields)
    busy = (user + nice + system + irq + soft_irq + stolen) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    own_seconds = own.user + own.system + own.children_user + own.children_system
    return ProcessorSeconds(time.perf_counter(), busy, own_seconds)


def share_of_others(before: ProcessorSeconds, after: ProcessorSeconds) -> float:
    """Return the share of all cores' time that other programs used between two readings."""
    others = (after.busy - before.busy) - (after.own - before.own)
    elapsed = max(after.elapsed - before.elapsed, 1e-9)
    return max(0.0, others / (elapsed * (os.cpu_count() or 1)))

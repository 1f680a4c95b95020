"""How much memory the machine has, and how much a process takes."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Return the largest resident set of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes(process: int | str = "self") -> tuple[int, int]:
    """Return a process's resident memory of its own and that of mapped files, in bytes; Linux only.

    The pages of a mapped file take no memory from anyone who needs it: the system drops them and reads them again.
    Raises OSError when there is no such process.
    """
    sizes = _kilobytes(Path(f"/proc/{process}/status"))
    return 1024 * sizes.get("RssAnon", 0), 1024 * (sizes.get("RssFile", 0) + sizes.get("RssShmem", 0))


def machine_memory_bytes() -> tuple[int, int] | None:
    """Return all memory and how much of it is free for programs, in bytes; None where the system does not tell."""
    try:
        sizes = _kilobytes(Path("/proc/meminfo"))
        return 1024 * sizes["MemTotal"], 1024 * sizes["MemAvailable"]
    except (OSError, KeyError):
        return None


def _kilobytes(file: Path) -> dict[str, int]:
    """Return the lines of a file of /proc that say `name: 123 kB`."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}

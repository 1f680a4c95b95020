"""Memory of the machine and of processes, and the user's folder for what can be made again."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Return the peak resident set size of this process in bytes; 0 if the system does not report it."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes(process: int | str = "self") -> tuple[int, int]:
    """Return a process's resident anonymous memory and resident mapped-file memory, in bytes; Linux only.

    The two are counted apart because the system can drop pages of mapped files and read them again. Raises OSError if
    there is no such process.
    """
    sizes = _kilobytes(Path(f"/proc/{process}/status"))
    return 1024 * sizes.get("RssAnon", 0), 1024 * (sizes.get("RssFile", 0) + sizes.get("RssShmem", 0))


def machine_memory_bytes() -> tuple[int, int] | None:
    """Return total and available memory in bytes; None if the system does not report them."""
    try:
        sizes = _kilobytes(Path("/proc/meminfo"))
        return 1024 * sizes["MemTotal"], 1024 * sizes["MemAvailable"]
    except (OSError, KeyError):
        return None


def fits_in_memory(n_bytes: int) -> bool:
    """Tell whether a file of this size can stay in the memory that is available; true if the system does not say."""
    memory = machine_memory_bytes()
    return memory is None or n_bytes < memory[1]


def _kilobytes(file: Path) -> dict[str, int]:
    """Return the `name: 123 kB` lines of a /proc file as name -> kB."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}

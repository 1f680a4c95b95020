"""doctor: what this machine gives the kernels, what they make of it, and what would make them faster."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cpu_kernels.compilation import kernel_cache
from cpu_kernels.simd import instruction_set, variants
from cpu_kernels.threads.bandwidth import BUFFER_BYTES, read_bandwidth
from cpu_kernels.threads.cores import physical_cores
from cpu_kernels.threads.thread_pool import ThreadPool, announcing_compilation
from tritgguf.diagnostics.bench import Table, processor_name
from tritgguf.machine import machine_memory_bytes
from tritgguf.runtime.compiler import require_compiler
from tritgguf.version import __version__

_PACKAGES = ("numba", "llvmlite", "numpy", "gguf", "tokenizers", "torch", "transformers")
_VERSIONS_IN_A_ROW = 3
_REPETITIONS = 3
_FEW_CORES = 4
_HIGH_LOAD = 0.5  # for each logical core
_LITTLE_MEMORY = 4 << 30


@dataclass(frozen=True)
class Diagnosis:
    """What was found; sizes in bytes."""

    processor: str
    features: list[str]
    """Those that some variant of the kernels needs."""
    instruction_set: str | None
    """None where the one that was asked for does not work."""
    instruction_set_problem: str | None
    """What is wrong with the one that was asked for."""
    better_instruction_sets: dict[str, str]
    """Each one that would be faster, and why it was not chosen."""
    physical_cores: int
    """That this process may use: the threads that commands take by default."""
    logical_cores: int
    load: float | None
    """Threads of all programs that wanted a core during the last minute; None where the system does not tell."""
    memory_total: int | None
    memory_available: int | None
    read_bandwidth: float
    """Bytes per second."""
    cache_folder: Path | None
    cache_is_writable: bool
    cache_bytes: int
    versions: dict[str, str]
    """Of this program, of Python and of the packages that are installed."""
    advice: list[str]
    """What would make it faster."""

    def as_dict(self) -> dict[str, Any]:
        """Return what `doctor --json` prints."""
        return {**vars(self), "cache_folder": None if self.cache_folder is None else str(self.cache_folder)}

    def tables(self) -> list[Table]:
        """Return title, columns and rows of the tables to print."""
        memory = fits = "unknown"
        if self.memory_total is not None and self.memory_available is not None:
            memory = f"{self.memory_total / 1e9:.1f} GB, {self.memory_available / 1e9:.1f} GB of them available"
            fits = f"up to {self.memory_available / 1e9:.1f} GB; larger mixtures of experts run too, slower"
        load = "" if self.load is None else f", a load of {self.load:.1f}"
        rows: list[tuple[str, ...]] = [
            ("processor", self.processor),
            ("features", ", ".join(self.features) or "none that the kernels need"),
            ("instruction set", self.instruction_set or f"none: {self.instruction_set_problem}"),
            *((f"  not {name}", reason) for name, reason in self.better_instruction_sets.items()),
            ("cores", f"{self.physical_cores} physical to use, {self.logical_cores} logical{load}"),
            ("memory", memory),
            ("files that fit", fits),
            ("read bandwidth", f"{self.read_bandwidth / 1e9:.1f} GB/s"),
            ("cache of kernels", str(self.cache_folder or "no folder can be written")),
            ("  in it", f"{self.cache_bytes / 1e6:.1f} MB{'' if self.cache_is_writable else ', cannot be written'}"),
        ]
        versions = [f"{name} {number}" for name, number in self.versions.items()]
        for first in range(0, len(versions), _VERSIONS_IN_A_ROW):
            rows.append(("" if first else "versions", ", ".join(versions[first : first + _VERSIONS_IN_A_ROW])))
        advice: list[tuple[str, ...]] = [(line,) for line in self.advice or ["nothing that this program knows of"]]
        return [("this machine", ("", ""), rows), ("what would make it faster", ("",), advice)]


def doctor(*, on_compilation: Callable[[], None] = lambda: None) -> Diagnosis:
    """Look at the machine and measure how fast it reads memory, which takes a second and up to 1 GB of memory.

    `on_compilation` is called if kernels have to be compiled first.
    """
    require_compiler()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with announcing_compilation(on_compilation):
        chosen, problem, better = _instruction_sets()
        memory = machine_memory_bytes()
        buffer_bytes = BUFFER_BYTES if memory is None else min(BUFFER_BYTES, memory[1] // 4)
        bandwidth = read_bandwidth(ThreadPool(), _REPETITIONS, buffer_bytes)
    folder = kernel_cache.folder()
    found: dict[str, Any] = {
        "processor": processor_name(),
        "features": instruction_set.features(),
        "instruction_set": chosen,
        "instruction_set_problem": problem,
        "better_instruction_sets": better,
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count() or 1,
        "load": load,
        "memory_total": None if memory is None else memory[0],
        "memory_available": None if memory is None else memory[1],
        "read_bandwidth": bandwidth,
        "cache_folder": folder,
        "cache_is_writable": folder is not None and _is_writable(folder),
        "cache_bytes": 0 if folder is None else _size_of_kernels(folder),
        "versions": _versions(),
    }
    return Diagnosis(**found, advice=_advice(Diagnosis(**found, advice=[])))


def _instruction_sets() -> tuple[str | None, str | None, dict[str, str]]:
    """Return the instruction set that is used, what is wrong with the one asked for, and why no better one is used."""
    try:
        chosen, problem = instruction_set.choose(), None
    except ValueError as error:
        return None, str(error), {}
    better = sorted((isa for isa in instruction_set.of_this_architecture() if isa > chosen), reverse=True)
    asked_for = f"works here, but {instruction_set.ENVIRONMENT_VARIABLE} asks for another one"
    reasons = {variants.name_of(isa): instruction_set.why_unavailable(isa) or asked_for for isa in better}
    return variants.name_of(chosen), problem, reasons


def _is_writable(folder: Path) -> bool:
    """Tell whether a file can be made in a folder, by making one: permissions alone do not say."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _size_of_kernels(folder: Path) -> int:
    """Return the bytes of the compiled kernels."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir() if file.suffix == kernel_cache.SUFFIX)
    except OSError:
        return 0


def _versions() -> dict[str, str]:
    versions = {"tritgguf": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _advice(found: Diagnosis) -> list[str]:
    """Return what would make this machine faster, a line each, the most effective first."""
    variable, lines = instruction_set.ENVIRONMENT_VARIABLE, []
    if found.instruction_set_problem is not None:
        lines.append(f"unset {variable}: {found.instruction_set_problem}")
    elif any(variable in reason for reason in found.better_instruction_sets.values()):
        lines.append(f"unset {variable}: a better instruction set than {found.instruction_set} works here")
    elif found.better_instruction_sets:
        name, reason = next(iter(found.better_instruction_sets.items()))
        lines.append(f"a better instruction set than {found.instruction_set}: {name} {reason}")
    if not found.cache_is_writable:
        lines.append(
            "set NUMBA_CACHE_DIR to a folder that can be written: every start compiles the kernels now, half a minute"
        )
    if found.load is not None and found.load > _HIGH_LOAD * found.logical_cores:
        lines.append(
            f"stop other programs: {found.load:.1f} threads wanted the {found.logical_cores} cores, and the read"
            " bandwidth was measured beside them"
        )
    if found.physical_cores < _FEW_CORES:
        lines.append(f"more cores than {found.physical_cores}: prompts are read faster with each of them")
    if found.memory_available is not None and found.memory_available < _LITTLE_MEMORY:
        lines.append(
            f"close other programs: files of more than {found.memory_available / 1e9:.1f} GB are read from the disk"
            " again for each token"
        )
    lines.append(
        f"smaller files or faster memory: a file of 1 GB gives at most {found.read_bandwidth / 1e9:.0f} tokens/s here"
    )
    return lines

"""Process-wide settings of torch and transformers, changed temporarily by context managers.

Each setting is restored afterwards, even if contexts overlap, in one thread or in several.
torch and transformers are imported inside functions because only the `verify` extra installs them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_READ_ONCE = {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "2000"}
"""Environment variables that torch reads at its first allocation and OpenMP when it is loaded."""
_MALLOC = {"MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, 0x7FFFFFFF)}
"""glibc's name of a setting -> its number for `mallopt` and the value."""
_MOST_FREED_BYTES = 1 << 29
"""So much freed memory may wait for the next arrays where `return_freed_memory` is called."""


class ProcessSetting:
    """A process-wide setting that several contexts can change at once.

    The value of the newest open context applies. When the last context ends, the original value is restored.
    """

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], object]) -> None:
        self._get, self._put = get, put
        self._lock = threading.Lock()
        self._original: Any = None
        self._values: dict[object, Any] = {}

    @contextlib.contextmanager
    def set_to(self, value: Any) -> Iterator[None]:
        """Set the value until the context ends."""
        context = object()
        with self._lock:
            if not self._values:
                self._original = self._get()
            self._values[context] = value
        try:
            with self._lock:
                self._put(value)
            yield
        finally:
            with self._lock:
                del self._values[context]
                self._put(next(reversed(self._values.values()), self._original))


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Set the number of torch's threads; None keeps torch's setting."""
    with contextlib.nullcontext() if threads is None else _THREADS.set_to(threads):
        yield


@contextlib.contextmanager
def bfloat16_matmul() -> Iterator[None]:
    """Allow torch bfloat16 products with float32 sums of float32 matrices, where the processor multiplies so fastest.

    Where it does, the result of calibration changes less than with another calibration text. On others torch may take
    oneDNN instead of MKL and multiply in float32 all the same, faster (`docs/quality.md`).
    """
    with _MATMUL_PRECISION.set_to("medium"):
        yield


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """Let torch multiply float32 matrices in float32, also within `bfloat16_matmul`."""
    with _MATMUL_PRECISION.set_to("highest"):
        yield


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """Suppress transformers' progress bars, warnings and log lines, but not its exceptions."""
    with _VERBOSITY.set_to(None):
        yield


def import_torch() -> None:
    """Import torch with the settings that it reads only once, for long calculations that alternate with our kernels.

    Huge pages: without them, page faults of large temporary tensors take half of calibration's time. Little spinning:
    torch's threads otherwise wait in a loop for milliseconds after each of its operations, on the cores that our
    kernels' threads need (a tenth of calibration's time). The environment variables are removed afterwards. If torch
    is imported already, they are not changed, and a variable that the user has set is kept. Freed memory is used again.
    """
    added = {} if "torch" in sys.modules else {k: v for k, v in _READ_ONCE.items() if k not in os.environ}
    if "OMP_WAIT_POLICY" in os.environ:
        added.pop("GOMP_SPINCOUNT", None)
    os.environ.update(added)
    try:
        import torch

        torch.empty(1)
    finally:
        for variable in added:
            del os.environ[variable]
    _use_freed_memory_again()


def _use_freed_memory_again() -> None:
    """Let glibc keep the memory of large freed arrays for the next ones.

    Otherwise it returns each to the system, which fills the next one with zeros: a fifth of calibration's time for a
    model of 1.5 billion weights. Settings of the user's (`MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`) are kept.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    for variable, (parameter, value) in _MALLOC.items():
        if mallopt is not None and variable not in os.environ:
            mallopt(parameter, value)


class _MallocUsage(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    )


def return_freed_memory() -> None:
    """Return freed memory to the system if there is much of it, before arrays of other sizes are made.

    Memory that is used again (`import_torch`) falls into pieces that the next large arrays do not fit.
    """
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    usage, trim = getattr(library, "mallinfo2", None), getattr(library, "malloc_trim", None)
    if usage is None or trim is None:  # another C library, or a glibc before 2.33
        return
    usage.restype = _MallocUsage
    if usage().fordblks > _MOST_FREED_BYTES:
        trim(ctypes.c_size_t(0))


def _get_threads() -> int:
    import torch

    return torch.get_num_threads()


def _put_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _get_precision() -> str:
    import torch

    return torch.get_float32_matmul_precision()


def _put_precision(precision: str) -> None:
    import torch

    torch.set_float32_matmul_precision(precision)


def _get_verbosity() -> tuple[int, bool, warnings.catch_warnings[Any]]:
    """Return transformers' log level, whether it shows progress bars, and the saved filters of Python's warnings."""
    from transformers.utils import logging

    filters = warnings.catch_warnings()
    filters.__enter__()
    return logging.get_verbosity(), logging.is_progress_bar_enabled(), filters


def _put_verbosity(verbosity: tuple[int, bool, warnings.catch_warnings[Any]] | None) -> None:
    """Restore what `_get_verbosity` returned; None means silence."""
    from transformers.utils import logging

    if verbosity is None:
        if _is_silent():
            return
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        return
    level, progress_bar, filters = verbosity
    filters.__exit__(None, None, None)
    logging.set_verbosity(level)
    if progress_bar:
        logging.enable_progress_bar()


def _is_silent() -> bool:
    """Tell whether another context has silenced transformers, because a change of the log level takes a while."""
    from transformers.utils import logging

    silent = logging.get_verbosity() == logging.CRITICAL and not logging.is_progress_bar_enabled()
    return silent and warnings.filters[:1] == [("ignore", None, Warning, None, 0)]


_THREADS = ProcessSetting(_get_threads, _put_threads)
_MATMUL_PRECISION = ProcessSetting(_get_precision, _put_precision)
_VERBOSITY = ProcessSetting(_get_verbosity, _put_verbosity)

"""Settings that torch and transformers keep for the whole process, changed for as long as we compute.

Each is put back to what it was, also when several blocks of code, of one thread or of several, want it at once.
torch and transformers are imported inside functions: only the `verify` extra brings them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any


class ProcessSetting:
    """A setting of the process that blocks of code want, each with a value of its own.

    The block that came last gets its value; when all have ended, the setting is what it was before the first.
    """

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], object]) -> None:
        self._get, self._put = get, put
        self._lock = threading.Lock()
        self._before: Any = None
        self._wanted: dict[object, Any] = {}

    @contextlib.contextmanager
    def held(self, value: Any) -> Iterator[None]:
        """Change the setting until the block ends."""
        block = object()
        with self._lock:
            if not self._wanted:
                self._before = self._get()
            self._wanted[block] = value
        try:
            with self._lock:
                self._put(value)
            yield
        finally:
            with self._lock:
                del self._wanted[block]
                self._put(next(reversed(self._wanted.values()), self._before))


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch compute with this many threads; None leaves their number to it."""
    with contextlib.nullcontext() if threads is None else _THREADS.held(threads):
        yield


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Let torch multiply float32 matrices in bfloat16, with float32 sums, where the processor has instructions for it.

    That is several times faster, and moves the result of calibration by less than another text would
    (`docs/quality.md`).
    """
    with _PRECISION.held("medium"):
        yield


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """Keep transformers from printing progress bars, warnings and log lines; exceptions pass."""
    with _SPEECH.held(None):
        yield


def import_torch_with_huge_pages() -> None:
    """Import torch, which allocates with huge pages then, unless the program uses it already or has said otherwise.

    Page faults of large temporary tensors took half of the time of calibration without them. torch looks at the
    environment once, at its first allocation, so nothing has to stay there.
    """
    variable = "THP_MEM_ALLOC_ENABLE"
    if "torch" in sys.modules or variable in os.environ:
        import torch

        return
    os.environ[variable] = "1"
    try:
        import torch

        torch.empty(1)
    finally:
        del os.environ[variable]


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


def _get_speech() -> tuple[int, bool, warnings.catch_warnings[Any]]:
    """Return transformers' verbosity, whether it shows progress bars, and what puts Python's warnings back."""
    from transformers.utils import logging

    filters = warnings.catch_warnings()
    filters.__enter__()
    return logging.get_verbosity(), logging.is_progress_bar_enabled(), filters


def _put_speech(speech: tuple[int, bool, warnings.catch_warnings[Any]] | None) -> None:
    """Put back what `_get_speech` has returned; None stands for silence."""
    from transformers.utils import logging

    if speech is None:
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        return
    verbosity, progress_bar, filters = speech
    filters.__exit__(None, None, None)
    logging.set_verbosity(verbosity)
    if progress_bar:
        logging.enable_progress_bar()


_THREADS = ProcessSetting(_get_threads, _put_threads)
_PRECISION = ProcessSetting(_get_precision, _put_precision)
_SPEECH = ProcessSetting(_get_speech, _put_speech)

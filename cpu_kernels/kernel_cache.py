"""Numba's cache of compiled kernels, made safe for a program: no failure of a disk and no old code reaches the user.

Numba raises an error where it finds no folder to keep machine code in or cannot write there, although only the next
start would have gained from it. And it compiles a kernel again when the file that it stands in changes, but not when
one that it is made from does: after an update, old machine code would go on giving old results.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

_PACKAGE = Path(__file__).resolve().parent
_logger = logging.getLogger(_PACKAGE.name)
_numba_enable_caching = Dispatcher.enable_caching


@functools.cache
def sources_stamp() -> str:
    """Return a hash of all sources of this package: kernels that were compiled from others are not used."""
    stamp = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        stamp.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return stamp.hexdigest()


@functools.cache
def _say_once(reason: str) -> None:
    _logger.warning(
        "note: compiled kernels cannot be kept, so that every start compiles them again: %s;"
        " NUMBA_CACHE_DIR names another folder",
        reason,
    )


class KernelCache(FunctionCache):
    """The cache of one kernel."""

    def __init__(self, py_func: Any) -> None:
        super().__init__(py_func)
        self._cache_file = IndexDataCacheFile(self.cache_path, self._impl.filename_base, sources_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load machine code; None stands for none, and for a file that is damaged or cannot be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever unpickling raises
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save machine code, if there is a place for it."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _say_once(f"{self.cache_path}: {error.strerror or error}")


def folder_of(kernel: Any) -> Path | None:
    """Return where a kernel's machine code is kept; None where there is no place for it."""
    path = kernel._cache.cache_path
    return None if path is None else Path(path)


def _enable_caching(dispatcher: Any) -> None:
    """Give a kernel of this package its cache, if there is a folder for it; functions of others get Numba's."""
    if not Path(inspect.getfile(dispatcher.py_func)).resolve().is_relative_to(_PACKAGE):
        _numba_enable_caching(dispatcher)
        return
    try:
        dispatcher._cache = KernelCache(dispatcher.py_func)
    except (RuntimeError, OSError):
        _say_once("no folder can be written")


def install() -> None:
    """Let kernels that are defined from now on use this cache."""
    numbas: Any = Dispatcher
    numbas.enable_caching = _enable_caching

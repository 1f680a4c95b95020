"""Numba's cache of compiled kernels, without disk errors and without stale machine code.

Numba raises an error if it finds no writable cache folder, although only the next start would use the cache. Here a
disk error is logged once. Numba recompiles a kernel when its own file changes, but not when a file that it imports
from does: after an update, stale machine code would run. Here any change of the package's sources invalidates the
cache.
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

from cpu_kernels.inner_functions import is_inner, make_inner

_PACKAGE = Path(__file__).resolve().parent
_logger = logging.getLogger(_PACKAGE.name)
_numba_enable_caching = Dispatcher.enable_caching


@functools.cache
def sources_hash() -> str:
    """Return a hash of all sources of this package; cached kernels with another hash are not used."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _warn_once(reason: str) -> None:
    _logger.warning(
        "note: compiled kernels cannot be cached, so every start compiles them again: %s;"
        " set NUMBA_CACHE_DIR to another folder",
        reason,
    )


class KernelCache(FunctionCache):
    """The cache of one kernel."""

    def __init__(self, py_func: Any) -> None:
        super().__init__(py_func)
        self._cache_file = IndexDataCacheFile(self.cache_path, self._impl.filename_base, sources_hash())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load machine code; return None if there is none, or if the file is damaged or unreadable."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever unpickling raises
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save machine code; an error of the file system only logs a note."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_once(f"{self.cache_path}: {error.strerror or error}")


def folder_of(kernel: Any) -> Path | None:
    """Return the cache folder of a kernel; None if it has none."""
    path = kernel._cache.cache_path
    return None if path is None else Path(path)


def _enable_caching(dispatcher: Any) -> None:
    """Replace the cache of this package's kernels; functions of other packages keep Numba's cache.

    Inner functions have none: they are part of the kernels that call them.
    """
    if not Path(inspect.getfile(dispatcher.py_func)).resolve().is_relative_to(_PACKAGE):
        _numba_enable_caching(dispatcher)
        return
    if is_inner(dispatcher):
        make_inner(dispatcher)
        return
    dispatcher.targetoptions["no_cfunc_wrapper"] = True
    try:
        dispatcher._cache = KernelCache(dispatcher.py_func)
    except (RuntimeError, OSError):
        _warn_once("no cache folder is writable")


def install() -> None:
    """Use this cache for all kernels defined from now on."""
    dispatcher_class: Any = Dispatcher
    dispatcher_class.enable_caching = _enable_caching

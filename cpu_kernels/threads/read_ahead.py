"""Asking the system for a part of a mapped file before it is read.

Where a file does not fit into memory, a thread that reads it waits for the disk at every few pages. Asked for many
pages at once, the system reads them while the threads compute. Windows has no such call: nothing happens there.
"""

from __future__ import annotations

import mmap

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import external_function

_IS_KNOWN = hasattr(mmap, "MADV_WILLNEED")
_ADVICE = getattr(mmap, "MADV_WILLNEED", 0)
_PAGE = mmap.PAGESIZE
_ADVISE = external_function("madvise", "int32", "intp", "uintp", "int32")


@numba.njit(cache=True)
def read_ahead(address, n_bytes):
    """Ask for `n_bytes` of a mapped file at an address; the pages may be read later than this returns, or never."""
    if _IS_KNOWN:
        start = address // _PAGE * _PAGE
        _ADVISE(start, address + n_bytes - start, _ADVICE)

"""Numba kernels of the trit codec and of the transformer's forward pass: arrays in, arrays out.

Nothing here knows a file or a model. `docs/format.md` specifies the packed rows that the kernels work on.
"""

from __future__ import annotations

import os
from pathlib import Path


def _forget_stale_kernels() -> None:
    """Delete compiled kernels that are older than any source of this package.

    Numba compiles a kernel again when the file that it stands in changes, but not when one that it is made from does:
    after an update, old machine code would go on giving old results.
    """
    sources = Path(__file__).parent
    newest = max(path.stat().st_mtime for path in sources.glob("*.py"))
    folders = [sources / "__pycache__"]
    if cache := os.environ.get("NUMBA_CACHE_DIR"):
        folders += Path(cache).glob(f"{sources.name}_*")
    for folder in folders:
        for path in folder.glob("*.nb[ic]"):
            try:
                if path.stat().st_mtime < newest:
                    path.unlink()
            except OSError:
                continue  # another process was faster, or the folder is read-only


_forget_stale_kernels()

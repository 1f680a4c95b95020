"""Whether kernels can be compiled here."""

from __future__ import annotations

import numba

from tritgguf.errors import TritGgufError


def require_compiler() -> None:
    """Raise TritGgufError if Numba is told not to compile: the kernels use instructions that Python does not have."""
    if numba.config.DISABLE_JIT:
        raise TritGgufError("NUMBA_DISABLE_JIT is set, and kernels can only run when they are compiled; unset it")

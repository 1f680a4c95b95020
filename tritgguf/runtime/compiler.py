"""The compilation of the kernels: whether it is possible here, and that it happens once."""

from __future__ import annotations

import os
import time

from cpu_kernels import precompile
from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.runtime import compilation_display


def require_compiler() -> None:
    """Raise TritGgufError if Numba is told not to compile: the kernels use instructions that Python does not have."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        raise TritGgufError("NUMBA_DISABLE_JIT is set, and kernels can only run when they are compiled; unset it")


def prepare_kernels(isa: str | None = None) -> float:
    """Compile all kernels if this machine has not done so; return the seconds that it took.

    `isa` names the instruction set; None takes the best that works here. Raises TritGgufError if kernels cannot be
    compiled, or for an unknown instruction set.
    """
    require_compiler()
    start = time.perf_counter()
    try:
        compiled = precompile.precompile(isa, compilation_display.display)
    except ValueError as error:
        raise BadRequestError(str(error)) from error
    return time.perf_counter() - start if compiled else 0.0

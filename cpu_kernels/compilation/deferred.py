"""Numba, imported when something has to be compiled, and what is registered there then."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

_waiting: list[Callable[[], object]] = []
_is_loaded = False


def load_numba() -> Any:
    """Import Numba, register what waits for it, and return it; ImportError if its settings forbid that."""
    global _is_loaded
    try:
        numba = importlib.import_module("numba")
        importlib.import_module("numba.extending")
    except ValueError as error:
        raise ImportError(str(error)).with_traceback(error.__traceback__) from error
    _is_loaded = True
    while _waiting:
        _waiting.pop()()
    return numba


def register(registration: Callable[[], object]) -> None:
    """Call `registration` when Numba is loaded; at once if it is."""
    if _is_loaded:
        registration()
    else:
        _waiting.append(registration)


def intrinsic_type(emit: Callable[..., Any]) -> Any:
    """Return the type by which Numba calls what `emit` generates (`numba.extending.intrinsic`)."""
    made = load_numba().extending.intrinsic(emit)
    context = importlib.import_module("numba.core.registry").cpu_target.typing_context
    context.refresh()
    return context.resolve_value_type(made)

"""How the compilation of the kernels is shown; imports nothing, so that the command line can choose it at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[int, int], None]  # work that is done, and all work


@contextmanager
def _log_once() -> Iterator[Progress]:
    """Show the compilation as one line in the log."""
    logging.getLogger("tritgguf").warning(
        "note: compiling the kernels for this processor; this happens once and takes about half a minute"
    )
    yield lambda done, total: None


_display: Callable[[], AbstractContextManager[Progress]] = _log_once


def show_with(display: Callable[[], AbstractContextManager[Progress]]) -> None:
    """Show later compilations with `display`, which is entered for each."""
    global _display
    _display = display


def display() -> AbstractContextManager[Progress]:
    """Return what shows a compilation: by default one line in the log."""
    return _display()

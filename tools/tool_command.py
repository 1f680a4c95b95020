"""Run a tool as a command: errors that a user can fix are one line and exit code 1."""

from __future__ import annotations

from collections.abc import Callable

import typer

from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError


def run(main: Callable[..., None]) -> None:
    """Parse the command line by the signature of `main` and call it."""
    try:
        typer.run(main)
    except TritGgufError as error:
        terminal.error(str(error))
        raise SystemExit(1) from None

"""`tritgguf doctor`: show what this machine offers the kernels."""

from __future__ import annotations

from tritgguf.cli import terminal
from tritgguf.cli.options import Json


def doctor_command(as_json: Json = False) -> None:
    """Show what this machine offers the kernels, how fast they run on it, and what would make them faster.

    Example: tritgguf doctor
    """
    from tritgguf.diagnostics.doctor import doctor

    diagnosis = doctor()
    if as_json:
        terminal.print_json(diagnosis.as_dict())
    else:
        for table in diagnosis.tables():
            terminal.print_table(*table)

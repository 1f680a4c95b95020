"""An attack: malicious input, the command that receives it, and the expected error message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Attack:
    """Untrusted input that violates one rule.

    Attributes:
        name: description of the violation.
        build: writes the input into an empty folder and returns the command's arguments.
        message_parts: expected parts of the error message: the file, the location and the remedy.

    """

    name: str
    build: Callable[[Path], list[str]]
    message_parts: tuple[str, ...]

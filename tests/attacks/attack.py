"""What an attack is: input that must be refused, the command that gets it, and what the refusal must say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Attack:
    """One rule that a stranger's file breaks.

    Attributes:
        name: of the rule.
        build: writes the input into an empty folder and returns the command's arguments.
        says: parts of the message: the file, the place in it, and the remedy.

    """

    name: str
    build: Callable[[Path], list[str]]
    says: tuple[str, ...]

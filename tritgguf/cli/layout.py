"""Fitting text into the width of a terminal."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Sequence
from typing import TextIO

from tritgguf.cli.word_wrap import WordWrap

_INDENT = "  "
_NARROW = 60  # columns; what is narrower shows the cells of a row below one another


def terminal_width(stream: TextIO) -> int:
    """Return the columns of the terminal behind a stream, or what the environment or a default says."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or shutil.get_terminal_size().columns
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def wrap(text: str, width: int) -> str:
    """Return a text with lines broken between words to fit the width."""
    wrapping = WordWrap(lambda: width)
    return wrapping.feed(text) + wrapping.flush()


def needs_stacking(names: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> bool:
    """Tell whether a table should be shown by `stacked`: the terminal is narrow, and the table is wider."""
    gaps = 3 * len(names) + 1
    return width < _NARROW and sum(max(map(len, column)) for column in zip(names, *rows, strict=True)) + gaps > width


def stacked(names: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Return the rows of a table: the first cell on a line, below it the others with the names of their columns."""
    lines = []
    for first, *others in rows:
        if len(others) == 1 and len(first) + len(_INDENT) + len(others[0]) <= width:
            lines.append(f"{first}{_INDENT}{others[0]}")
            continue
        lines += textwrap.wrap(first, width) or [""]
        named = [f"{name} {cell}" for name, cell in zip(names[1:], others, strict=True) if cell]
        if len(others) == 1:
            named = others
        lines += textwrap.wrap(", ".join(named), width, initial_indent=_INDENT, subsequent_indent=_INDENT)
    return "\n".join(lines)


def pairs(rows: Sequence[tuple[str, str]], width: int) -> str:
    """Return names and what they mean, side by side or, where that does not fit, below one another."""
    if needs_stacking(("", ""), rows, width):
        return stacked(("", ""), rows, width)
    longest = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{longest}}  {meaning}".rstrip() for name, meaning in rows)

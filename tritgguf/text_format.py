"""Formatting of text for the terminal: sizes, single lines, no control characters."""

from __future__ import annotations

_CONTROL_CHARACTERS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")})


def strip_control_characters(text: str) -> str:
    """Return a text without its control characters, except line feeds and tabs."""
    return text.translate(_CONTROL_CHARACTERS)


def one_line(text: str) -> str:
    """Return a text on one line, without control characters."""
    return strip_control_characters(" ".join(text.split()))


def format_bytes(count: float) -> str:
    """Return a size in decimal units, such as 61.3 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"

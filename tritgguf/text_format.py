"""Sizes as text, and text for the terminal: single lines, no control characters."""

from __future__ import annotations

import re

_SIZE_PATTERN = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?([kKMGT]?)(i?)B?")
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


def parse_bytes(text: str) -> int | None:
    """Return a size such as 5GB or 500MiB in bytes; None if it is no size or less than one byte."""
    match = _SIZE_PATTERN.fullmatch(text.strip())
    if match is None:
        return None
    number, prefix, binary = match.groups()
    count = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    return count if count >= 1 else None

"""The table of a file's parts, which `convert` and `inspect` print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tritgguf.cli.terminal import print_table
from tritgguf.text_format import format_bytes

if TYPE_CHECKING:
    from tritgguf.formats.file_parts import FilePart


def print_parts(title: str, parts: Sequence[FilePart]) -> None:
    """Print what a file consists of."""
    rows = [
        (
            part.name,
            ", ".join(part.types),
            str(part.weights) if part.weights else "",
            format_bytes(part.bytes),
            "" if part.bits_per_weight is None else f"{part.bits_per_weight:.3f}",
        )
        for part in parts
    ]
    print_table(title, ("part", "types", ">weights", ">size", ">bits per weight"), rows)

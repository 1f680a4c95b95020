"""`tritgguf inspect`: show what is in a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritgguf.cli import terminal
from tritgguf.cli.model_file import local_file
from tritgguf.cli.options import Json
from tritgguf.cli.parts import print_parts
from tritgguf.cli.terminal import print_table
from tritgguf.text_format import format_bytes

if TYPE_CHECKING:
    from tritgguf.formats.description import FileDescription


def print_description(file: FileDescription) -> None:
    """Print the contents of a file."""
    from tritgguf.formats.description import abbreviate

    print_table("metadata", ("key", "value"), [(key, abbreviate(value)) for key, value in file.metadata.items()])
    rows = []
    for tensor in file.tensors:
        book = tensor.codebook
        shape = " x ".join(map(str, tensor.shape))
        scales = "" if book is None else f"{min(book):.3g} .. {max(book):.3g}"
        if book is not None and tensor.matrices > 1:
            scales += f" ({tensor.matrices} experts)"
        rows.append((tensor.name, tensor.type, shape, f"{tensor.bytes}", scales))
    print_table("tensors", ("name", "type", ">shape", ">bytes", "codebook"), rows)
    print_table(
        "types",
        ("type", ">tensors", ">weights", ">size", ">bits per weight"),
        [
            (
                entry.type,
                f"{entry.tensors}",
                f"{entry.weights}",
                format_bytes(entry.bytes),
                f"{entry.bits_per_weight:.3f}",
            )
            for entry in file.types
        ],
    )
    print_parts("parts", file.parts)
    summary = [
        ("file", str(file.path)),
        ("name", file.name),
        ("architecture", file.architecture),
        ("size", format_bytes(file.file_bytes)),
        ("weights", str(file.weights)),
    ]
    for label, bits in (
        ("bits per weight, quantized matrices", file.bits_per_weight_quantized),
        ("bits per weight, file", file.bits_per_weight_file),
    ):
        if bits is not None:
            summary.append((label, f"{bits:.3f}"))
    print_table("summary", ("", ""), summary)


def inspect_command(
    file: Annotated[Path, typer.Argument(help="Any GGUF file.", metavar="FILE.gguf")], as_json: Json = False
) -> None:
    """Show what is in a GGUF file: keys, tensors, types, codebooks, bits per weight.

    Example: tritgguf inspect d3.gguf
    """
    from tritgguf.formats.description import describe

    description = describe(local_file(file))
    if as_json:
        terminal.print_json(description.as_dict())
    else:
        print_description(description)

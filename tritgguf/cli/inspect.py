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
    from tritgguf.formats.scores import Score


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
    if file.score is not None:
        print_score(file.score)


def print_score(score: Score) -> None:
    """Print what a file records of its measures."""
    from tritgguf.evaluation.text_windows import shipped_text
    from tritgguf.formats.scores import text_fingerprint

    text = "the text in the package" if score.text == text_fingerprint(shipped_text()) else f"SHA-256 {score.text}"
    source = " at ".join(filter(None, (score.source, score.revision)))
    rows = [
        ("source", source or "unknown"),
        ("text", f"{score.tokens} tokens of {text}"),
        ("KL divergence, mean", f"{score.kl_mean:.4f}"),
        ("KL divergence, 99th percentile", f"{score.kl_p99:.4f}"),
        ("same top token", f"{score.top1_agreement:.1%}"),
        ("perplexity", f"{score.perplexity:.3f}"),
        ("perplexity of the source", f"{score.perplexity_reference:.3f}"),
    ]
    print_table("recorded score", ("", ""), rows)


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

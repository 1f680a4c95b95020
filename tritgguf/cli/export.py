"""`tritgguf export`: write a trit file for transformers or llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritgguf.cli import terminal
from tritgguf.cli.model_file import local_file
from tritgguf.cli.options import Json, Threads, TritFile, option
from tritgguf.cli.terminal import note, print_table
from tritgguf.text_format import format_bytes

if TYPE_CHECKING:
    from tritgguf.exporters.export import ExportReport


def print_export(report: ExportReport) -> None:
    """Print the report of an export."""
    print_table(
        f"{report.source} -> {report.output}",
        ("file", ">size"),
        [(name, format_bytes(size)) for name, size in report.files.items()],
    )
    rows = [
        ("weights", str(report.weights)),
        ("source", format_bytes(report.source_bytes)),
        ("output", format_bytes(report.output_bytes)),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", format_bytes(report.peak_memory_bytes)),
    ]
    print_table(f"format {report.to}", ("", ">"), rows)
    for warning in report.warnings:
        note(f"warning: {warning}")


def export_command(
    file: TritFile,
    output: Annotated[Path, typer.Argument(help="The folder or GGUF file to write.", metavar="OUT")],
    to: Annotated[
        str,
        option("--to", metavar="FORMAT", help="hf: a Hugging Face folder; f16, bf16, q8_0, q4_0: a stock GGUF file."),
    ],
    max_shard_size: Annotated[
        str, option("--max-shard-size", metavar="SIZE", help="Maximum size of one safetensors file.")
    ] = "5GB",
    base_model: Annotated[
        str | None,
        option("--base-model", metavar="ORG/NAME", help="The source's hub id for the model card.", show_default=False),
    ] = None,
    threads: Threads = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output file; a folder is never replaced.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a trit file's model for transformers, or for llama.cpp and Ollama.

    Example: tritgguf export d3.gguf d3-q8_0.gguf --to q8_0
    """
    from tritgguf.exporters.export import export

    trit_file = local_file(file)
    with terminal.progress(in_bytes=True) as report:
        result = export(
            trit_file,
            output,
            to=to,
            max_shard_size=max_shard_size,
            base_model=base_model,
            threads=threads,
            overwrite=overwrite,
            progress=report,
        )
    if as_json:
        terminal.print_json(result.as_dict())
    else:
        print_export(result)

"""The table and the chart of compared files, which `compare` and `verify` show, and the speed in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritgguf.cli import terminal
from tritgguf.cli.options import option
from tritgguf.text_format import format_bytes

if TYPE_CHECKING:
    from tritgguf.evaluation.quantization_costs import FileQuality

TritFiles = Annotated[
    list[Path], typer.Argument(help="GGUF files that `convert` wrote, or names on the hub.", metavar="FILE.gguf")
]
TextToEvaluate = Annotated[
    Path | None,
    option("--text", metavar="FILE", help="Text to evaluate on.", show_default="a text in the package"),
]
TokensToEvaluate = Annotated[int, option("--tokens", min=2, help="Number of tokens to evaluate.")]
Plot = Annotated[
    Path | None,
    option("--plot", metavar="OUT.svg", help="Draw the divergence over the size, as SVG.", show_default=False),
]


def print_qualities(title: str, files: Sequence[FileQuality]) -> None:
    """Print a row for each file."""
    columns = [
        "file",
        ">size",
        ">bits per weight",
        ">KL, mean",
        ">KL, 99th percentile",
        ">same top token",
        ">perplexity",
    ]
    with_speed = any(file.tokens_per_second is not None for file in files)
    rows = []
    for file in files:
        row = [
            str(file.file),
            format_bytes(file.file_bytes),
            f"{file.bits_per_weight:.2f}",
            f"{file.kl_mean:.4f}",
            f"{file.kl_p99:.4f}",
            f"{file.top1_agreement:.1%}",
            f"{file.perplexity:.3f}",
        ]
        speed = "" if file.tokens_per_second is None else f"{file.tokens_per_second:.1f}"
        rows.append([*row, speed] if with_speed else row)
    terminal.print_table(title, [*columns, ">tokens/s"] if with_speed else columns, rows)


def with_speeds(files: Sequence[FileQuality], threads: int | None, isa: str | None) -> list[FileQuality]:
    """Return the rows with how fast each file generates, as `bench` measures it."""
    from tritgguf.diagnostics.bench import generation_speed

    measured = []
    with terminal.progress(in_bytes=False) as report:
        for done, file in enumerate(files):
            report("speed", done, len(files))
            measured.append(dataclasses.replace(file, tokens_per_second=generation_speed(file.file, threads, isa)))
        report("speed", len(files), len(files))
    return measured


def write_plot(output: Path, title: str, subtitle: str, files: Sequence[FileQuality]) -> None:
    """Write the chart of the files."""
    from tritgguf.evaluation.chart import chart
    from tritgguf.formats import svg

    svg.write(output, chart(title, subtitle, files))

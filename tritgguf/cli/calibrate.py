"""`tritgguf calibrate`: measure which inputs matter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritgguf.cli import terminal
from tritgguf.cli.calibration_text import read_calibration_text
from tritgguf.cli.options import CalibrationTokens, Json, OwnText, TextFile, TextSeed, Threads, option
from tritgguf.cli.terminal import print_table
from tritgguf.text_format import format_bytes

if TYPE_CHECKING:
    from tritgguf.calibration.importance import CalibrateReport


def print_calibration(report: CalibrateReport) -> None:
    """Print what a calibration measured."""
    rows = [
        ("text", report.text),
        ("tokens", str(report.tokens)),
        ("matrices", str(report.matrices)),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", format_bytes(report.peak_memory_bytes)),
    ]
    print_table(f"{report.source} -> {report.output}", ("", ">"), rows)


def calibrate_command(
    source: Annotated[
        str,
        typer.Argument(help="A Hugging Face folder, a hub id (org/name), or a GGUF file.", metavar="SOURCE"),
    ],
    output: Annotated[Path, option("--output", "-o", metavar="FILE", help="The GGUF file to write.")],
    text: TextFile = None,
    own_text: OwnText = False,
    tokens: CalibrationTokens = None,
    seed: TextSeed = 0,
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")] = False,
    as_json: Json = False,
) -> None:
    """Measure which inputs matter: an importance matrix for `convert --imatrix` and for llama-quantize.

    Example: tritgguf calibrate models/SmolLM2-135M-Instruct -o imatrix.gguf --self
    """
    from tritgguf.calibration.importance import calibrate
    from tritgguf.formats.gguf_writer import check_output

    check_output(output, overwrite)
    windows, origin = read_calibration_text(source, text, own_text, tokens, seed, threads)
    with terminal.progress(in_bytes=False) as report:
        result = calibrate(
            source,
            output,
            windows,
            text=origin,
            threads=threads,
            overwrite=overwrite,
            progress=lambda done, total: report("calibrating, decoder blocks", done, total),
        )
    if as_json:
        terminal.print_json(vars(result))
    else:
        print_calibration(result)

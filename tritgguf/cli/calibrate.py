"""`tritgguf calibrate`: measure an importance matrix."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tritgguf.cli import terminal
from tritgguf.cli.options import (
    CalibrationTokens,
    Json,
    Overwrite,
    SelfText,
    SourceModel,
    TextFile,
    TextSeed,
    Threads,
    option,
)
from tritgguf.cli.terminal import print_table
from tritgguf.cli.text_windows import TextOptions, read_windows
from tritgguf.text_format import format_bytes

if TYPE_CHECKING:
    from tritgguf.calibration.importance import ImportanceReport


def print_importance(report: ImportanceReport) -> None:
    """Print the report of `calibrate`."""
    rows = [
        ("text", report.text),
        ("tokens", str(report.tokens)),
        ("matrices", str(report.matrices)),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", format_bytes(report.peak_memory_bytes)),
    ]
    print_table(f"{report.source} -> {report.output}", ("", ">"), rows)


def calibrate_command(
    source: SourceModel,
    output: Annotated[Path, option("--output", "-o", metavar="FILE", help="The GGUF file to write.")],
    text: TextFile = None,
    self_text: SelfText = False,
    tokens: CalibrationTokens = None,
    seed: TextSeed = 0,
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure an importance matrix for `convert --imatrix` and for llama-quantize.

    Example: tritgguf calibrate models/SmolLM2-135M-Instruct -o imatrix.gguf --self
    """
    from tritgguf.calibration.importance import measure_importance
    from tritgguf.formats.durable_output import check_output
    from tritgguf.runtime.compiler import prepare_kernels

    started = time.perf_counter()
    check_output(output, overwrite, [source, text])
    windows, origin = read_windows(source, TextOptions(text, self_text, tokens, seed), threads)
    started += prepare_kernels()
    with terminal.progress(in_bytes=False) as report:
        result = measure_importance(
            source,
            output,
            windows,
            text=origin,
            threads=threads,
            overwrite=overwrite,
            progress=lambda done, total: report("calibrating, decoder blocks", done, total),
        )
    result = replace(result, seconds=time.perf_counter() - started)  # with the time that the text took
    if as_json:
        terminal.print_json(vars(result))
    else:
        print_importance(result)

"""`tritgguf verify`: compare trit files with their source."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritgguf.cli import terminal
from tritgguf.cli.model_file import local_file
from tritgguf.cli.options import InstructionSet, Json, Threads
from tritgguf.cli.quality_table import (
    Plot,
    TextToEvaluate,
    TokensToEvaluate,
    TritFiles,
    print_qualities,
    with_speeds,
    write_plot,
)
from tritgguf.cli.terminal import print_table

if TYPE_CHECKING:
    from tritgguf.evaluation.verify import VerifyReport


def print_verification(report: VerifyReport) -> None:
    """Print the report of one file."""
    print_table(
        f"Runner: {report.file} against transformers on its dequantized weights, {report.tokens} tokens",
        ("", ">"),
        [
            ("largest logit difference, relative", f"{report.max_rel_logit_diff:.1e}"),
            ("  with 16-bit activations, as run decodes", f"{report.max_rel_logit_diff_int16:.1e}"),
            ("KL divergence of 8-bit activations, as run reads prompts", f"{report.kl_int8:.1e}"),
        ],
    )
    print_table(
        f"Quantization: {report.file} against {report.source}, {report.tokens} tokens",
        ("", ">"),
        [
            ("KL divergence, mean", f"{report.kl_mean:.4f}"),
            ("KL divergence, 99th percentile", f"{report.kl_p99:.4f}"),
            ("same top token", f"{report.top1_agreement:.1%}"),
            ("perplexity", f"{report.perplexity:.3f}"),
            ("perplexity of the source", f"{report.perplexity_reference:.3f}"),
            *([] if report.tokens_per_second is None else [("tokens per second", f"{report.tokens_per_second:.1f}")]),
        ],
    )
    _print_layers(report, "Hidden states after each block, error relative to the original")


def print_verifications(reports: Sequence[VerifyReport]) -> None:
    """Print a row for each of several files, verified against one source."""
    first = reports[0]
    print_table(
        f"Runner against transformers on the dequantized weights, {first.tokens} tokens",
        ("file", ">largest logit difference", ">with 16-bit activations", ">KL of 8-bit activations"),
        [
            (
                str(report.file),
                f"{report.max_rel_logit_diff:.1e}",
                f"{report.max_rel_logit_diff_int16:.1e}",
                f"{report.kl_int8:.1e}",
            )
            for report in reports
        ],
    )
    print_qualities(
        f"Quantization, against {first.source} with a perplexity of {first.perplexity_reference:.3f}",
        [report.quality for report in reports],
    )
    for report in reports:
        _print_layers(report, f"Hidden states after each block of {report.file}, error relative to the original")


def _print_layers(report: VerifyReport, title: str) -> None:
    """Print the errors of the blocks, if requested."""
    if report.layers is not None:
        print_table(
            title,
            (">block", ">of this block", ">of all so far"),
            [(str(layer.block), f"{layer.own:.4f}", f"{layer.accumulated:.4f}") for layer in report.layers],
        )


def verify_command(
    source: Annotated[str, typer.Argument(help="The model that the files were converted from.", metavar="SOURCE")],
    files: TritFiles,
    text_file: TextToEvaluate = None,
    tokens: TokensToEvaluate = 512,
    layers: Annotated[bool, typer.Option("--layers", help="Also show the error of each block.")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Record the scores in the files, where inspect, list and exports show them.")
    ] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Also measure the tokens per second of each file.")] = False,
    plot: Plot = None,
    threads: Threads = None,
    isa: InstructionSet = None,
    as_json: Json = False,
) -> None:
    """Compare trit files with their source: is the runner correct, and what does quantization cost?

    With several files, tables have a row per file and --json prints a list with an object per file. The source's logits
    are kept on disk for the next files (TRITGGUF_LOGITS: at most so much, such as 4GB; 0: none).
    Needs torch and transformers: pip install torch transformers accelerate.

    Example: tritgguf verify models/SmolLM2-135M-Instruct d3.gguf
    """
    from tritgguf.evaluation.logits_store import user_store
    from tritgguf.evaluation.recorded_scores import ScoreRecorder, score_of
    from tritgguf.evaluation.verify import verify_files
    from tritgguf.formats.durable_output import check_output
    from tritgguf.formats.text_file import read_text

    text = None if text_file is None else read_text(text_file)
    files = [local_file(file) for file in files]
    recorder = ScoreRecorder(files) if write else None
    if plot is not None:
        check_output(plot, True, [source, *files])
    settings: dict[str, Any] = {"layers": layers, "threads": threads, "isa": isa, "store": user_store()}
    with terminal.progress(in_bytes=False) as report:
        reports = verify_files(source, files, text=text, tokens=tokens, **settings, progress=report)
    if recorder is not None:
        for result in reports:
            recorder.record(result.file, score_of(result))
    if speed:
        measured = with_speeds([report.quality for report in reports], threads, isa)
        reports = [
            dataclasses.replace(report, tokens_per_second=row.tokens_per_second)
            for report, row in zip(reports, measured, strict=True)
        ]
    if plot is not None:
        write_plot(plot, "Divergence and size", f"against {reports[0].source}", [report.quality for report in reports])
    if as_json:
        objects = [report.as_dict() for report in reports]
        terminal.print_json(objects[0] if len(objects) == 1 else objects)
    elif len(reports) == 1:
        print_verification(reports[0])
    else:
        print_verifications(reports)

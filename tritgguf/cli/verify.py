"""`tritgguf verify`: compare a trit file with its source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritgguf.cli import terminal
from tritgguf.cli.options import InstructionSet, Json, Threads, TritFile, option
from tritgguf.cli.terminal import print_table

if TYPE_CHECKING:
    from tritgguf.evaluation.verify import VerifyReport


def print_verification(report: VerifyReport) -> None:
    """Print both answers of a verification."""
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
        ],
    )
    if report.layers is not None:
        print_table(
            "Hidden states behind each block, error relative to the original",
            (">block", ">of this block", ">of all so far"),
            [(str(layer.block), f"{layer.own:.4f}", f"{layer.accumulated:.4f}") for layer in report.layers],
        )


def verify_command(
    source: Annotated[str, typer.Argument(help="What the file was converted from.", metavar="SOURCE")],
    file: TritFile,
    text_file: Annotated[
        Path | None,
        option("--text", metavar="FILE", help="A text to measure on.", show_default="one that comes along"),
    ] = None,
    tokens: Annotated[int, option("--tokens", min=2, help="How many tokens of the text to take.")] = 512,
    layers: Annotated[bool, typer.Option("--layers", help="Show which blocks the error comes from, too.")] = False,
    threads: Threads = None,
    isa: InstructionSet = None,
    as_json: Json = False,
) -> None:
    """Compare a trit file with its source: whether the runner is right, what quantization cost.

    Needs torch and transformers: pip install "tritgguf[verify]".

    Example: tritgguf verify models/SmolLM2-135M-Instruct d3.gguf
    """
    from tritgguf.evaluation.verify import verify

    text = None if text_file is None else text_file.read_bytes().decode("utf-8", errors="replace")
    with terminal.progress(in_bytes=False) as report:
        result = verify(
            source, file, text=text, tokens=tokens, layers=layers, threads=threads, isa=isa, progress=report
        )
    if as_json:
        terminal.print_json(result.as_dict())
    else:
        print_verification(result)

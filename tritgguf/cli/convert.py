"""`tritgguf convert`: pack a model into trits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritgguf.cli import terminal
from tritgguf.cli.calibration_text import read_calibration_text
from tritgguf.cli.options import CalibrationTokens, Json, OwnText, TextFile, TextSeed, Threads, option
from tritgguf.cli.terminal import note, print_table
from tritgguf.errors import TritGgufError
from tritgguf.text_format import format_bytes

if TYPE_CHECKING:
    import numpy as np

    from tritgguf.conversion.convert import ConvertProgress
    from tritgguf.conversion.report import ConvertReport


def print_conversion(report: ConvertReport) -> None:
    """Print what a conversion made."""
    print_table(
        f"{report.source} -> {report.output}",
        ("type", ">tensors", ">size"),
        [
            (name, str(count), format_bytes(report.bytes_by_type[name]))
            for name, count in report.tensors_by_type.items()
        ],
    )
    rows = [
        ("bits per weight, quantized matrices", f"{report.bits_per_weight_quantized:.3f}"),
        ("bits per weight, file", f"{report.bits_per_weight_file:.3f}"),
        ("relative error", f"{report.relative_error:.4f}"),
        ("file", format_bytes(report.file_bytes)),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", format_bytes(report.peak_memory_bytes)),
    ]
    print_table(f"depth {report.depth}, encoder {report.encoder}", ("", ">"), rows)
    if report.kept_unaligned:
        names = ", ".join(report.kept_unaligned)
        note(f"note: kept in F16, because their row length is no multiple of 64: {names}")
    for warning in report.warnings:
        note(f"warning: {warning}")


def convert_command(
    source: Annotated[
        str,
        typer.Argument(help="A Hugging Face folder, a hub id (org/name), or a GGUF file.", metavar="SOURCE"),
    ],
    output: Annotated[Path, typer.Argument(help="The GGUF file to write.", metavar="OUT.gguf")],
    depth: Annotated[
        int | None,
        option("--depth", help="Trits per weight, 1 to 4.", show_default="2, or what is recovered"),
    ] = None,
    output_depth: Annotated[
        int | None, option("--output-depth", help="The same of the output head; 0: F16.", show_default="F16")
    ] = None,
    embedding_depth: Annotated[
        int | None, option("--embedding-depth", help="The same of the embeddings; 0: F16.", show_default="F16")
    ] = None,
    encoder: Annotated[
        str,
        option(
            "--encoder",
            metavar="NAME",
            help="v2: quantize as published; best: try every scale; imatrix: by importance; calibrated: let a text go"
            " through the model and make up for what is lost; tuned: train on the text besides; recover: recover"
            " dequantized trits exactly; recover+v2: v2 where that cannot be done.",
            show_default="recover where a source holds such trits, otherwise v2",
        ),
    ] = "auto",
    imatrix: Annotated[
        Path | None,
        option("--imatrix", metavar="FILE", help="Importance by `calibrate` or llama-imatrix.", show_default=False),
    ] = None,
    keep: Annotated[
        str | None,
        option(
            "--keep",
            metavar="RULES",
            help="Other depths for some matrices, 0 for F16: 'blk.0.*=3,*.ffn_down=3'.",
            show_default=False,
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        option("--target-bpw", help="Choose depths by what each matrix can bear, to average N bits per weight."),
    ] = None,
    sensitivity: Annotated[
        float | None,
        option("--sensitivity", help="Take a trit from matrices whose error in the block's output stays below N."),
    ] = None,
    text: TextFile = None,
    own_text: OwnText = False,
    tokens: CalibrationTokens = None,
    seed: TextSeed = 0,
    tune: Annotated[
        bool, typer.Option("--tune", help="Train every block on the text; much slower, worth it at depths 1 and 2.")
    ] = False,
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same command was interrupted, if it was.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Pack a model's matrices into trits.

    Example: tritgguf convert models/SmolLM2-135M-Instruct d3.gguf --depth 3
    """
    from tritgguf.conversion.convert import convert
    from tritgguf.conversion.depths import DepthChoice, parse_rules
    from tritgguf.conversion.encoders import WITH_TEXT
    from tritgguf.conversion.own_text import KeptText
    from tritgguf.formats.gguf_writer import check_output

    check_output(output, overwrite)
    choice = DepthChoice(tuple(parse_rules(keep)) if keep is not None else (), target_bpw, sensitivity)
    windows = None
    if tune:
        encoder = _tuned(encoder)
    with KeptText(output, resume=resume) as kept:
        if text is not None or own_text or encoder.endswith(WITH_TEXT) or choice.needs_text:
            windows, _ = read_calibration_text(source, text, own_text, tokens, seed, threads, kept)
        with terminal.progress(in_bytes=True) as report:

            def show(state: ConvertProgress) -> None:
                report(state.tensor, state.bytes_done, state.bytes_total)

            result = convert(
                source,
                output,
                depth=depth,
                output_depth=output_depth,
                embedding_depth=embedding_depth,
                encoder=encoder,
                importance=None if imatrix is None else _importance(source, imatrix),
                windows=windows,
                choice=choice,
                threads=threads,
                overwrite=overwrite,
                resume=resume,
                progress=show,
            )
    if as_json:
        terminal.print_json(vars(result))
    else:
        print_conversion(result)


def _tuned(encoder: str) -> str:
    """Return the encoder that trains besides."""
    if encoder == "auto":
        return "tuned"
    if not encoder.endswith(("calibrated", "tuned")):
        raise TritGgufError(
            f"--tune trains on a text, which the encoder {encoder} does not take; leave one of them away"
        )
    return encoder.replace("calibrated", "tuned")


def _importance(source: str, path: Path) -> dict[str, np.ndarray]:
    """Read the importance of the source's matrices."""
    from tritgguf.formats.imatrix import read_importance
    from tritgguf.sources.open import open_source

    columns = {tensor.name: tensor.shape[-1] for tensor in open_source(source).tensors if len(tensor.shape) == 2}
    return read_importance(path, columns)

"""The commands that make files: `tritgguf convert`, `calibrate` and `export`.

As in `tritgguf.cli`, what a command needs is imported inside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritgguf import console
from tritgguf.cli_options import CalibrationTokens, Json, OwnText, TextFile, TextSeed, Threads, TritFile, option
from tritgguf.errors import TritGgufError

if TYPE_CHECKING:
    import numpy as np

    from tritgguf.calibration_text import KeptText
    from tritgguf.convert import ConvertProgress


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
    from tritgguf.calibration_text import KeptText
    from tritgguf.convert import convert
    from tritgguf.depth_plan import DepthChoice, parse_rules
    from tritgguf.encoders import WITH_TEXT
    from tritgguf.gguf_writer import check_output

    check_output(output, overwrite)
    choice = DepthChoice(tuple(parse_rules(keep)) if keep is not None else (), target_bpw, sensitivity)
    windows = None
    if tune:
        encoder = _tuned(encoder)
    with KeptText(output, resume=resume) as kept:
        if text is not None or own_text or encoder.endswith(WITH_TEXT) or choice.needs_text:
            windows, _ = _calibration_windows(source, text, own_text, tokens, seed, threads, kept)
        with console.progress(in_bytes=True) as report:

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
        console.print_json(vars(result))
    else:
        console.print_conversion(result)


def _tuned(encoder: str) -> str:
    """Return the encoder that trains besides."""
    if encoder == "auto":
        return "tuned"
    if not encoder.endswith(("calibrated", "tuned")):
        raise TritGgufError(
            f"--tune trains on a text, which the encoder {encoder} does not take; leave one of them away"
        )
    return encoder.replace("calibrated", "tuned")


def _calibration_windows(
    source: str,
    text: Path | None,
    own_text: bool,
    tokens: int | None,
    seed: int,
    threads: int | None,
    kept: KeptText | None = None,
) -> tuple[list[list[int]], str]:
    """Return the calibration text that the options ask for, as windows of tokens, and where it comes from."""
    from tritgguf.calibration_text import calibration_windows
    from tritgguf.checkpoint import open_source

    if text is not None and own_text:
        raise TritGgufError("--text and --self both say what to calibrate on; give one of them")
    with console.progress(in_bytes=False) as report:
        return calibration_windows(
            open_source(source),
            text,
            tokens,
            seed=seed,
            threads=threads,
            kept=kept,
            progress=lambda done, total: report("writing a text", done, total),
        )


def _importance(source: str, path: Path) -> dict[str, np.ndarray]:
    """Read the importance of the source's matrices."""
    from tritgguf.checkpoint import open_source
    from tritgguf.imatrix import read_importance

    columns = {tensor.name: tensor.shape[-1] for tensor in open_source(source).tensors if len(tensor.shape) == 2}
    return read_importance(path, columns)


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
    from tritgguf.calibrate import calibrate
    from tritgguf.gguf_writer import check_output

    check_output(output, overwrite)
    windows, origin = _calibration_windows(source, text, own_text, tokens, seed, threads)
    with console.progress(in_bytes=False) as report:
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
        console.print_json(vars(result))
    else:
        console.print_calibration(result)


def export_command(
    file: TritFile,
    output: Annotated[Path, typer.Argument(help="The folder or GGUF file to write.", metavar="OUT")],
    to: Annotated[
        str,
        option("--to", metavar="FORMAT", help="hf: a Hugging Face folder; f16, bf16, q8_0, q4_0: a stock GGUF file."),
    ],
    max_shard_size: Annotated[
        str, option("--max-shard-size", metavar="SIZE", help="Most weights in one file of a folder.")
    ] = "5GB",
    base_model: Annotated[
        str | None,
        option("--base-model", metavar="ORG/NAME", help="The source's hub id for the model card.", show_default=False),
    ] = None,
    threads: Threads = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output file; a folder never is.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a trit file's model for transformers, or for llama.cpp and Ollama.

    Example: tritgguf export d3.gguf d3-q8_0.gguf --to q8_0
    """
    from tritgguf.export import export

    with console.progress(in_bytes=True) as report:
        result = export(
            file,
            output,
            to=to,
            max_shard_size=max_shard_size,
            base_model=base_model,
            threads=threads,
            overwrite=overwrite,
            progress=report,
        )
    if as_json:
        console.print_json(result.as_dict())
    else:
        console.print_export(result)

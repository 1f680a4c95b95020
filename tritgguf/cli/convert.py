"""`tritgguf convert`: pack a model into trits."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from tritgguf.cli import terminal
from tritgguf.cli.options import (
    CalibrationTokens,
    Depth,
    EmbeddingDepth,
    EncoderName,
    ImatrixFile,
    Json,
    KeepRules,
    OutputDepth,
    OutputFile,
    Overwrite,
    OwnTokens,
    RecipeName,
    Resume,
    SelfText,
    Sensitivity,
    SourceModel,
    TargetBits,
    TargetSize,
    TextFile,
    TextSeed,
    Threads,
    Tune,
    UsageError,
)
from tritgguf.cli.parts import print_parts
from tritgguf.cli.terminal import note, print_table
from tritgguf.cli.text_windows import TextOptions, read_windows
from tritgguf.errors import TritGgufError
from tritgguf.text_format import format_bytes

if TYPE_CHECKING:
    from tritgguf.conversion.depths import DepthChoice, DepthOptions
    from tritgguf.conversion.encoders import Encoder, Quantizer
    from tritgguf.conversion.report import ConvertReport
    from tritgguf.sources.source import Source

_TRAINED = ("blocks", "end-to-end", "both")  # keys of `encoders.TUNED`, without the time that importing it takes


class ConvertCommand(TyperCommand):
    """The command line of `convert`, where the value of `--tune` may be missing."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; UsageError if there is one too many and it stands where a value of `--tune` would."""
        given, doubtful = list(args), ""
        for position, argument in enumerate(args):
            following = args[position + 1] if position + 1 < len(args) else "-"
            if argument == "--tune" and following not in _TRAINED:
                given[position] = "--tune=blocks"
                doubtful = "" if following.startswith("-") else following
        if doubtful and self.make_parser(ctx).parse_args(list(given))[1]:
            raise UsageError(f"--tune {doubtful} does not exist; choose from {', '.join(_TRAINED)}")
        return super().parse_args(ctx, given)


def print_conversion(report: ConvertReport) -> None:
    """Print the report of a conversion, and what to do next."""
    from tritgguf.conversion.next_steps import next_steps
    from tritgguf.formats.file_parts import LAYERS

    print_parts(f"{report.source} -> {report.output}", report.parts)
    rows = [
        ("bits per weight, quantized matrices", f"{report.bits_per_weight_quantized:.3f}"),
        ("bits per weight, file", f"{report.bits_per_weight_file:.3f}"),
        ("relative error", f"{report.relative_error:.4f}"),
        ("file", format_bytes(report.file_bytes)),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", format_bytes(report.peak_memory_bytes)),
    ]
    of_layers = next((part.types for part in report.parts if part.name == LAYERS), ())
    depth = "depths up to" if sum(kind.startswith("TRIT") for kind in of_layers) > 1 else "depth"
    print_table(f"{depth} {report.depth}, encoder {report.encoder}", ("", ">"), rows)
    for line in report.notes:
        note(f"note: {line}")
    for warning in report.warnings:
        note(f"warning: {warning}")
    for step in next_steps(report):
        note(step)


def _prepare(
    source: str, options: DepthOptions, encoder: Encoder, text: Path | None, imatrix: Path | None
) -> tuple[Any, list[str]]:
    """Check the source, depths, encoder and files, then compile the kernels; return the importance matrix and warnings.

    Raises TritGgufError for what cannot be used, before kernels are compiled.
    """
    from tritgguf.conversion.importance_file import importance_of
    from tritgguf.conversion.plan import check_conversion
    from tritgguf.formats.text_file import is_pipe, read_text
    from tritgguf.runtime.compiler import prepare_kernels
    from tritgguf.sources.open import open_source

    check_conversion(open_source(source), options, encoder)
    # A pipe can be read only once, and is read for the windows.
    if text is not None and not is_pipe(text) and not read_text(text).strip():
        raise TritGgufError(f"{text}: has no text; give a text file")
    importance = (None, []) if imatrix is None else importance_of(source, imatrix)
    prepare_kernels()
    return importance


@contextlib.contextmanager
def _explained_interruption(target: Path) -> Iterator[None]:
    """Say how an interrupted conversion goes on, if it can."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        for suffix, kept in ((".part.journal", ".part"), (".part.text", ".part.text")):
            if os.path.exists(f"{target}{suffix}"):
                note(f"interrupted; the same command with --resume goes on ({target}{kept} is kept for it)")
                break
        raise


def _default_encoder(source: str, depths: DepthOptions, tokens: int | None, threads: int | None) -> Encoder:
    """Return the encoder where the user named none and gave no input for one; print what it takes or misses."""
    from tritgguf.calibration.text import DEFAULT_GENERATED_TOKENS
    from tritgguf.conversion.default_encoder import default_encoder
    from tritgguf.sources.open import open_source

    default = default_encoder(open_source(source), depths, tokens or DEFAULT_GENERATED_TOKENS, threads)
    for line in default.notes:
        note(line)
    return default.encoder


def _announce(
    quantizer: Quantizer | None, threads: int | None, choice: DepthChoice, source: Source, tokens: int
) -> None:
    """Say how long calibrating on a text of some tokens takes, if the quantizer does that."""
    from tritgguf.conversion.default_encoder import calibration_note
    from tritgguf.conversion.encoders import Calibrated

    if isinstance(quantizer, Calibrated):
        note(calibration_note(source, quantizer, tokens, threads, measures=choice.needs_text))


def _say_what_has_no_use(options: DepthOptions, text: TextOptions | None) -> None:
    """Say which options change nothing: a depth beside a target; those of a text that nothing needs (None: needed)."""
    if options.choice.has_target and options.depth is not None and options.recipe is None:
        note("note: --depth has no use here, except for dequantized trits: the target chooses the depths")
    if text is not None and (text.tokens is not None or text.seed):
        note(
            "note: --tokens and --seed have no use here: nothing is calibrated; give --self, --text or another encoder"
        )


def _convert(step: str, source: str, output: Path, **settings: Any) -> ConvertReport:
    """Convert a source and show the progress, with what `step` says before it."""
    from tritgguf.conversion.convert import convert

    with terminal.progress(in_bytes=True) as report:
        settings["progress"] = lambda state: report(step + state.tensor, state.bytes_done, state.bytes_total)
        return convert(source, output, **settings)


def convert_command(
    source: SourceModel,
    output: OutputFile,
    depth: Depth = None,
    recipe: RecipeName = None,
    output_depth: OutputDepth = None,
    embedding_depth: EmbeddingDepth = None,
    encoder: EncoderName = "auto",
    imatrix: ImatrixFile = None,
    keep: KeepRules = None,
    target_bpw: TargetBits = None,
    target_size: TargetSize = None,
    sensitivity: Sensitivity = None,
    text: TextFile = None,
    self_text: SelfText = False,
    own_text: OwnTokens = None,
    tokens: CalibrationTokens = None,
    seed: TextSeed = 0,
    tune: Tune = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Pack a model's matrices into trits.

    Example: tritgguf convert models/SmolLM2-135M-Instruct d3.gguf --depth 3
    """
    from tritgguf.conversion.depths import DepthChoice, DepthOptions, parse_rules
    from tritgguf.conversion.encoders import parse_encoder, quantizer_of, with_tuning
    from tritgguf.conversion.own_text import SavedText
    from tritgguf.conversion.recipes import parse_recipe
    from tritgguf.formats.durable_output import check_output

    target = check_output(output, overwrite, [source, text, imatrix], resume=resume)
    choice = DepthChoice(() if keep is None else tuple(parse_rules(keep)), target_bpw, sensitivity, target_size)
    chosen = parse_encoder(encoder) if tune is None else with_tuning(parse_encoder(encoder), tune)
    depths: dict[str, Any] = {"depth": depth, "output_depth": output_depth, "embedding_depth": embedding_depth}
    depths |= {"choice": choice, "recipe": recipe and parse_recipe(recipe)}
    settings: dict[str, Any] = {"threads": threads, "overwrite": overwrite, "resume": resume, "windows": None}
    text_options = TextOptions(text, self_text, tokens, seed, own_text)
    importance, warnings = _prepare(source, options := DepthOptions(**depths), chosen, text, imatrix)
    started = time.perf_counter()
    is_default = encoder == "auto" and not (tune or imatrix or text_options.is_given or choice.needs_text)
    chosen = _default_encoder(source, options, tokens, threads) if is_default else chosen
    needs_text = text_options.is_given or chosen.needs_text or choice.needs_text
    _say_what_has_no_use(options, None if needs_text else text_options)
    # Refuses what does not go together before a text is read or written.
    quantizer = quantizer_of(chosen, importance, () if needs_text else None, text_has_other_use=choice.needs_text)
    steps = ("1/2 ", "2/2 ") if needs_text and (text is None or own_text) else ("", "")  # each with its own progress
    with _explained_interruption(target), SavedText(target, resume=resume) as saved:
        if needs_text:
            announce = partial(_announce, None if is_default else quantizer, threads, choice)
            settings["windows"], _ = read_windows(source, text_options, threads, saved, announce, steps[0])
        result = _convert(steps[1], source, output, **depths, encoder=chosen, importance=importance, **settings)
    result.warnings += warnings
    result.seconds = time.perf_counter() - started  # with the time that the text took
    terminal.print_json(result.as_dict()) if as_json else print_conversion(result)

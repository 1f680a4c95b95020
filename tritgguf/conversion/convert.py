"""Convert a source to packed GGUF files: plan, write, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.conversion.default_encoder import MEASURING_PASSES
from tritgguf.conversion.depths import NO_CHOICE, DepthChoice, DepthOptions
from tritgguf.conversion.encoders import (
    Automatic,
    Calibrated,
    Encoder,
    EncodingJob,
    Importance,
    Quantizer,
    Windows,
    parse_encoder,
    quantizer_of,
)
from tritgguf.conversion.pipeline import Output, encode_and_write, written_weights
from tritgguf.conversion.plan import ConversionPlan, plan_conversion
from tritgguf.conversion.recipes import Recipe, parse_recipe
from tritgguf.conversion.report import ConvertReport, conversion_report
from tritgguf.conversion.saved_matrices import SavedMatrices
from tritgguf.formats.durable_output import check_output
from tritgguf.formats.gguf_writer import StreamingWriter
from tritgguf.formats.journal import Journal
from tritgguf.runtime.compiler import prepare_kernels
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source


@dataclass(frozen=True)
class ConvertProgress:
    """Progress of a conversion in bytes of the source's tensors, which count for each file and each search."""

    tensor: str
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class Conversion:
    """A file to make of a source; the attributes are those of `convert`, with the depths in `options`."""

    output: str | Path
    options: DepthOptions
    encoder: Encoder
    importance: Importance | None = None
    windows: Windows | None = None
    overwrite: bool = False
    resume: bool = False

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer of matrices that are not recovered; TritGgufError if one of its inputs is missing."""
        other_use = self.options.choice.needs_text
        return quantizer_of(self.encoder, self.importance, self.windows, text_has_other_use=other_use)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    depth: int | None = None,
    output_depth: int | None = None,
    embedding_depth: int | None = None,
    encoder: str | Encoder = Automatic.name,
    importance: Importance | None = None,
    windows: Windows | None = None,
    choice: DepthChoice = NO_CHOICE,
    recipe: str | Recipe | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> ConvertReport:
    """Convert a checkpoint to a GGUF file with packed trit matrices.

    If the source is a trit file, tensors that already have the requested type are copied and matrices that are not
    packed stay unpacked. Other tensors are decoded and quantized again, which loses quality (the report warns).

    Args:
        source: a Hugging Face folder, a hub id or a GGUF file.
        output: the file to write; it appears only when it is complete.
        depth: trits per weight of the layers' matrices, 1 to 4; None means 2. For recovered matrices it is the
            maximum, and None means no maximum.
        output_depth, embedding_depth: trits per weight of the output head and of the embeddings, or 0 for F16. None
            means the recipe's depth. If both are one tensor, either option sets it.
        encoder: an encoder from `encoders`, or its name.
        importance, windows: inputs of the encoders that need them, see `encoders`. A `choice` that measures
            sensitivities needs windows too.
        choice: depths of single matrices in the layers. A target also chooses those of output head and embeddings,
            unless the other options set them.
        recipe: a recipe from `recipes`, or its name: depths of the output head and the embeddings. None means
            "balanced"; what is packed in a trit file keeps its type, and beside recovered matrices only what holds
            dequantized trits is packed.
        threads: processor cores to use; None means all.
        overwrite: whether an existing output may be replaced.
        resume: whether to resume an interrupted conversion with the same arguments; otherwise it starts over.
        progress: called after every tensor, and after every matrix of a stack.

    Raises:
        TritGgufError: bad input, or the output cannot be written. No file is left, with one exception: if the disk is
            full, or on another exception such as KeyboardInterrupt, `OUTPUT.part` and its journal stay for `resume`.

    """
    named_recipe = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    options = DepthOptions(depth, output_depth, embedding_depth, choice, named_recipe)
    chosen = parse_encoder(encoder) if isinstance(encoder, str) else encoder
    conversion = Conversion(output, options, chosen, importance, windows, overwrite, resume)
    return convert_together(source, [conversion], threads=threads, progress=progress)[0]


def convert_together(
    source: str | Path | Source,
    conversions: Sequence[Conversion],
    *,
    threads: int | None = None,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> list[ConvertReport]:
    """Convert a source, which may be open already, to several files; return a report for each, in order.

    Each matrix is read once for all of them, and encoded once for those that encode it alike. A conversion whose
    encoder follows the blocks (`Quantizer.in_block_order`) has an order of its own, so it must be the only one. Other
    arguments and errors are those of `convert`. The files appear together, at the end.
    """
    started = time.perf_counter()
    inputs = [source if isinstance(source, str | Path) else source.name]
    outputs = [check_output(one.output, one.overwrite, inputs, resume=one.resume) for one in conversions]
    opened = open_source(str(source)) if isinstance(source, str | Path) else source
    if len(conversions) > 1 and any(conversion.quantizer.in_block_order for conversion in conversions):
        raise ValueError("an encoder that follows the blocks cannot share a pass over the source")
    thread_pool = ThreadPool(threads)
    started += prepare_kernels()
    counter = _ProgressCounter(opened, len(conversions), progress)
    plans = [
        plan_conversion(
            opened,
            one.options,
            one.encoder,
            one.importance,
            one.windows,
            thread_pool,
            counter.searched,
            counter.measured,
        )
        for one in conversions
    ]
    with ExitStack() as opened_files:
        saved = [
            opened_files.enter_context(SavedMatrices(output, resume=one.resume))
            for output, one in zip(outputs, conversions, strict=True)
        ]
        writers = [
            opened_files.enter_context(_writer(plan, output, thread_pool, one))
            for plan, output, one in zip(plans, outputs, conversions, strict=True)
        ]
        results = _encode(plans, writers, saved, thread_pool, counter)
    seconds = (time.perf_counter() - started) / max(1, len(conversions))
    return [
        conversion_report(plan, output, squares, seconds, warnings)
        for plan, output, (squares, warnings) in zip(plans, outputs, results, strict=True)
    ]


def _writer(plan: ConversionPlan, output: Path, thread_pool: ThreadPool, conversion: Conversion) -> StreamingWriter:
    """Return a writer for the plan's file."""
    return StreamingWriter(
        output,
        plan.metadata,
        plan.tensors,
        overwrite=conversion.overwrite,
        journal=Journal(output, plan.job(thread_pool.threads)),
        resume=conversion.resume,
    )


def _encode(
    plans: Sequence[ConversionPlan],
    writers: Sequence[StreamingWriter],
    saved: Sequence[SavedMatrices],
    thread_pool: ThreadPool,
    counter: _ProgressCounter,
) -> list[tuple[tuple[float, float], list[str]]]:
    """Encode and write the tensors of plans for one source, and save what is calibrated long before it is written.

    Returns for each the sums of the squared errors and of the squared weights, and warnings.
    """
    outputs = []
    for plan, writer, kept in zip(plans, writers, saved, strict=True):
        written = partial(written_weights, writer)
        job = EncodingJob(plan.source, plan.quantized_depths, thread_pool, written, counter.prepared)
        if isinstance(plan.quantizer, Calibrated):
            counter.expect(plan.quantizer.passes)
            if plan.quantizer.end_to_end is not None:
                known = kept.matrices(plan.job(thread_pool.threads))
                job = replace(job, calibrated=known, save=kept.save)
        outputs.append(Output(writer, plan.recovery.fits, plan.quantizer, plan.quantizer.start(job)))
    squares = np.zeros((len(plans), 2))
    # Closed before the writers are: an interruption in `written` must not leave a thread that goes on writing.
    with closing(encode_and_write(plans[0].source, outputs, thread_pool)) as matrices:
        for number, name, matrix_squares in matrices:
            squares[number] += matrix_squares
            counter.written(name)
    return [
        ((float(error), float(power)), output.encoder.warnings)
        for (error, power), output in zip(squares, outputs, strict=True)
    ]


class _ProgressCounter:
    """Counts the bytes done and reports them to the caller of `convert`."""

    def __init__(self, source: Source, files: int, listener: Callable[[ConvertProgress], None] | None) -> None:
        self._listener = listener
        self._bytes = {name: tensor.matrix_bytes for tensor in source.tensors for name in tensor.matrices}
        self._pass, self._share = sum(self._bytes.values()), 0.0
        self._done, self._total = 0, files * self._pass

    def expect(self, passes: float) -> None:
        """Count passes over all matrices that come before the first one is written."""
        self._total += round(passes * self._pass)

    def measured(self, done: int, total: int) -> None:
        """Count a block for which costs of depths were measured."""
        if done == 1:
            self.expect(MEASURING_PASSES)
        self.prepared("choosing depths", MEASURING_PASSES / total)

    def prepared(self, label: str, share: float) -> None:
        """Count a share of such a pass."""
        self._share += share
        whole = round(self._share * self._pass)
        self._share -= whole / self._pass
        self._report(label, whole)

    def searched(self, name: str) -> None:
        """Count a matrix that was searched for trits and will be read again to be written."""
        self._total += self._bytes[name]
        self.written(name)

    def written(self, name: str) -> None:
        """Count a matrix that was written."""
        self._report(name, self._bytes[name])

    def _report(self, label: str, n_bytes: int) -> None:
        self._done += n_bytes
        if self._listener is not None:
            self._listener(ConvertProgress(label, self._done, self._total))

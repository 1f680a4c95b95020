"""Convert a source to a packed GGUF file: plan, write, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.conversion.depths import NO_CHOICE, DepthChoice, DepthOptions
from tritgguf.conversion.encoders import Automatic, Calibrated, Encoder, EncodingJob, Importance, Windows, parse_encoder
from tritgguf.conversion.pipeline import encode_and_write, written_weights
from tritgguf.conversion.plan import ConversionPlan, plan_conversion
from tritgguf.conversion.recipes import Recipe, parse_recipe
from tritgguf.conversion.report import ConvertReport, conversion_report
from tritgguf.formats.durable_output import check_output
from tritgguf.formats.gguf_writer import StreamingWriter
from tritgguf.formats.journal import Journal
from tritgguf.runtime.compiler import prepare_kernels
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source


@dataclass(frozen=True)
class ConvertProgress:
    """Progress of a conversion in bytes of the source's tensors; tensors that are read twice count twice."""

    tensor: str
    bytes_done: int
    bytes_total: int


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
    started = time.perf_counter()
    named_recipe = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    options = DepthOptions(depth, output_depth, embedding_depth, choice, named_recipe)
    chosen = parse_encoder(encoder) if isinstance(encoder, str) else encoder
    output = check_output(output, overwrite, [source], resume=resume)
    opened, thread_pool = open_source(str(source)), ThreadPool(threads)
    started += prepare_kernels()
    counter = _ProgressCounter(opened, progress)
    plan = plan_conversion(opened, options, chosen, importance, windows, thread_pool, counter.searched)
    with _writer(plan, output, thread_pool, overwrite=overwrite, resume=resume) as writer:
        squares, warnings = _encode(plan, writer, thread_pool, counter)
    return conversion_report(plan, output, squares, time.perf_counter() - started, warnings)


def _writer(
    plan: ConversionPlan, output: Path, thread_pool: ThreadPool, *, overwrite: bool, resume: bool
) -> StreamingWriter:
    """Return a writer for the plan's file."""
    journal = Journal(output, plan.job(thread_pool.threads))
    return StreamingWriter(output, plan.metadata, plan.tensors, overwrite=overwrite, journal=journal, resume=resume)


def _encode(
    plan: ConversionPlan, writer: StreamingWriter, thread_pool: ThreadPool, counter: _ProgressCounter
) -> tuple[tuple[float, float], list[str]]:
    """Encode and write a plan's tensors; return sums of the squared errors and of the squared weights, and warnings."""
    if isinstance(plan.quantizer, Calibrated):
        counter.expect(plan.quantizer.passes)
    job = EncodingJob(
        plan.source, plan.quantized_depths, thread_pool, partial(written_weights, writer), counter.prepared
    )
    squares = np.zeros(2)
    names = [name for tensor in plan.tensors for name in tensor.matrices]
    encoder = plan.quantizer.start(job)
    # Closed before the writer is: an interruption in `written` must not leave a thread that goes on writing.
    with closing(encode_and_write(plan.source, writer, plan.recovery.fits, encoder, thread_pool)) as matrices:
        for name, matrix_squares in zip(names, matrices, strict=True):
            squares += matrix_squares
            counter.written(name)
    return (float(squares[0]), float(squares[1])), encoder.warnings


class _ProgressCounter:
    """Counts the bytes done and reports them to the caller of `convert`."""

    def __init__(self, source: Source, listener: Callable[[ConvertProgress], None] | None) -> None:
        self._listener = listener
        self._bytes = {name: tensor.matrix_bytes for tensor in source.tensors for name in tensor.matrices}
        self._done, self._total = 0, sum(self._bytes.values())
        self._pass, self._share = self._total, 0.0

    def expect(self, passes: int) -> None:
        """Count passes over all matrices that come before the first one is written."""
        self._total += passes * self._pass

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

"""Source -> packed GGUF: plan, write, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.conversion.depths import NO_CHOICE, DepthChoice, DepthOptions
from tritgguf.conversion.encoders import Automatic, Encoder, EncodingJob, Importance, Windows, parse_encoder
from tritgguf.conversion.pipeline import stream, written_weights
from tritgguf.conversion.plan import ConversionPlan, plan_conversion
from tritgguf.conversion.report import ConvertReport, conversion_report
from tritgguf.formats.gguf_writer import StreamingWriter, check_output
from tritgguf.formats.journal import Journal
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source


@dataclass(frozen=True)
class ConvertProgress:
    """How far a conversion is, in bytes of the source's tensors; those that are read twice count twice."""

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
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> ConvertReport:
    """Convert a checkpoint to a GGUF file with packed trit matrices.

    Of a trit file as the source, tensors that have the wanted type are copied; the others are decoded, which loses
    quality (the report warns). Matrices that are not packed there stay as they are.

    Args:
        source: a Hugging Face folder, a hub id or a GGUF file.
        output: the file to write; it appears only when it is complete.
        depth: trits per weight of the layers' matrices, 1 to 4; None for 2. The most for matrices that are recovered,
            and None is for any.
        output_depth, embedding_depth: the same of the output head and of the embeddings, or 0 for F16; None for F16
            too, but leaves packed ones of a trit file as they are. Where both are one tensor, either will do.
        encoder: one of `encoders`, or its name: how matrices become trits.
        importance, windows: for the encoders that need them, see `encoders`; measured depth choices need windows too.
        choice: which matrices of the layers have another depth than `depth`.
        threads: processor cores to use; None for all.
        overwrite: whether an existing output may be replaced.
        resume: whether to go on where the same conversion was interrupted, if it was; otherwise it starts over.
        progress: called after every tensor.

    Raises:
        TritGgufError: bad input or no way to write the output. Nothing is left behind, except `OUTPUT.part` and its
            journal after a full disk or, as after Ctrl-C, another exception: `resume` goes on with them.

    """
    started = time.perf_counter()
    options = DepthOptions(depth, output_depth, embedding_depth, choice)
    chosen = parse_encoder(encoder) if isinstance(encoder, str) else encoder
    output = Path(output)
    check_output(output, overwrite)
    opened, thread_pool = open_source(str(source)), ThreadPool(threads)
    count = _ProgressCount(opened, progress)
    plan = plan_conversion(opened, options, chosen, importance, windows, thread_pool, count.searched)
    with _writer(plan, output, thread_pool, overwrite=overwrite, resume=resume) as writer:
        squares = _encode(plan, writer, thread_pool, count.written)
    return conversion_report(plan, output, squares, time.perf_counter() - started)


def _writer(
    plan: ConversionPlan, output: Path, thread_pool: ThreadPool, *, overwrite: bool, resume: bool
) -> StreamingWriter:
    """Return the writer of a plan's file."""
    journal = Journal(output, plan.job(thread_pool.threads))
    return StreamingWriter(output, plan.metadata, plan.tensors, overwrite=overwrite, journal=journal, resume=resume)


def _encode(
    plan: ConversionPlan, writer: StreamingWriter, thread_pool: ThreadPool, written: Callable[[str], None]
) -> tuple[float, float]:
    """Encode and write a plan's tensors; return the sums of the squared errors and of the squared weights.

    `written` is called with the name of each tensor that is written.
    """
    job = EncodingJob(plan.source, plan.quantized_depths, thread_pool, partial(written_weights, writer))
    squares = np.zeros(2)
    tensors = stream(plan.source, writer, plan.recovery.fits, plan.quantizer.start(job), thread_pool)
    for tensor, tensor_squares in zip(plan.tensors, tensors, strict=True):
        squares += tensor_squares
        written(tensor.name)
    return float(squares[0]), float(squares[1])


class _ProgressCount:
    """Counts the bytes that are done and tells the caller of `convert`."""

    def __init__(self, source: Source, listener: Callable[[ConvertProgress], None] | None) -> None:
        self._listener = listener
        self._bytes = {tensor.name: tensor.stored_bytes for tensor in source.tensors}
        self._done, self._total = 0, sum(self._bytes.values())

    def searched(self, name: str) -> None:
        """Count a tensor that was searched for trits and is still to be written."""
        self._total += self._bytes[name]
        self.written(name)

    def written(self, name: str) -> None:
        """Count a tensor that was written."""
        self._done += self._bytes[name]
        if self._listener is not None:
            self._listener(ConvertProgress(name, self._done, self._total))

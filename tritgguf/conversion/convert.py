"""Source -> packed GGUF: what is wanted is decided here, and what came of it reported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cpu_kernels.threads.crew import Crew
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.conversion.depths import NO_CHOICE, DepthChoice, Sensitivities
from tritgguf.conversion.encoders import CALIBRATED, IMATRIX, WITH_TEXT, make_encoder
from tritgguf.conversion.file_metadata import file_metadata
from tritgguf.conversion.pipeline import stream, written_weights
from tritgguf.conversion.plan import block_of, job_of, loss_warning, planned_tensor, wanted_depths
from tritgguf.conversion.recovery import AUTOMATIC, RecoveryPlan, encoder_names, plan_recovery
from tritgguf.conversion.report import ConvertReport
from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.gguf_header import F16, F32
from tritgguf.formats.gguf_writer import PlannedTensor, StreamingWriter, check_output
from tritgguf.formats.journal import Journal
from tritgguf.formats.trit_types import TritType
from tritgguf.machine import peak_memory_bytes
from tritgguf.quantization.matrix_encoders import DEFAULT_ENCODER
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source

_DEFAULT_DEPTH = 2
_SENSITIVITY_WINDOWS = 4  # of the calibration text


@dataclass(frozen=True)
class ConvertProgress:
    """How far a conversion is, in bytes of the source's tensors; those that are read twice count twice."""

    tensor: str
    bytes_done: int
    bytes_total: int


class _Progress:
    """Counts the bytes that are done and tells the caller of `convert`."""

    def __init__(self, source: Source, listener: Callable[[ConvertProgress], None] | None) -> None:
        self._listener = listener
        self._bytes = {tensor.name: tensor.stored_bytes for tensor in source.tensors}
        self._done, self._total = 0, sum(self._bytes.values())

    def searched(self, name: str) -> None:
        """Count a tensor that was looked through and is still to be written."""
        self._total += self._bytes[name]
        self.finished(name)

    def finished(self, name: str) -> None:
        """Count a tensor that was written."""
        self._done += self._bytes[name]
        if self._listener is not None:
            self._listener(ConvertProgress(name, self._done, self._total))


def convert(
    source: str | Path,
    output: str | Path,
    *,
    depth: int | None = None,
    output_depth: int | None = None,
    embedding_depth: int | None = None,
    encoder: str = AUTOMATIC,
    importance: Mapping[str, np.ndarray] | None = None,
    windows: Sequence[Sequence[int]] | None = None,
    choice: DepthChoice = NO_CHOICE,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> ConvertReport:
    """Convert a checkpoint to a GGUF file with packed trit matrices.

    A tensor that is in the wanted type already is copied. A trit file as the source is decoded where it is not, which
    loses quality (the report warns); its matrices that are not packed stay as they are. A source of dequantized trits
    is recognized and recovered exactly (`docs/recovery.md`).

    Args:
        source: a Hugging Face folder, a hub id or a GGUF file.
        output: the file to write; it appears only when it is complete.
        depth: trits per weight of the layers' matrices, 1 to 4; None for 2. Of matrices that are recovered it is the
            most that they may take, and None is for any.
        output_depth, embedding_depth: the same of the output head and of the embeddings, or 0 for F16; None for F16
            too, but leaves packed ones of a trit file as they are. Where both are one tensor, either will do.
        encoder: how scales are chosen, one of `recovery_plan.encoder_names`: `auto` recovers dequantized trits and
            quantizes everything else, `recover` wants an exact fit for every matrix.
        importance: what the encoder `imatrix` needs, see `encoders.make_encoder`; `auto` takes that encoder then.
        windows: the same for `calibrated` and `tuned`; a depth choice that measures needs them too.
        choice: which matrices of the layers have another depth than `depth`.
        threads: processor cores to use; None for all.
        overwrite: whether an existing output may be replaced.
        resume: whether to go on where the same conversion was interrupted, if it was; otherwise it starts over.
        progress: called after every tensor.

    Raises:
        TritGgufError: bad input or no way to write the output. Nothing is left behind, unless the disk was full or, as
            after Ctrl-C, it was no error of the input: then `OUTPUT.part` and its journal stay to be continued.

    """
    started = time.perf_counter()
    _check_options(depth, output_depth, embedding_depth, encoder)
    output = Path(output)
    check_output(output, overwrite)
    crew = Crew(threads)
    opened = open_source(str(source))
    counted = _Progress(opened, progress)
    depths = wanted_depths(opened, depth or _DEFAULT_DEPTH, output_depth, embedding_depth)
    default = IMATRIX if importance is not None else CALIBRATED if windows is not None else DEFAULT_ENCODER
    recovery = _plan_recovery(opened, depths, encoder, depth, crew, counted, default)
    depths |= _chosen_depths(opened, depths, recovery, choice, depth or _DEFAULT_DEPTH, windows, crew)
    depths |= {name: fit.depth for name, fit in recovery.fits.items()}
    plan = [planned_tensor(tensor.name, tensor.shape, depths[tensor.name]) for tensor in opened.tensors]
    if recovery.fallback in WITH_TEXT:
        plan.sort(key=lambda tensor: block_of(tensor.name))  # checkpoints may have the tenth block before the second
    wanted = {
        t.name: depths[t.name] for t in plan if trit_types.is_trit_type(t.type_id) and t.name not in recovery.fits
    }
    text = windows if recovery.fallback in WITH_TEXT or not choice.needs_text else None
    deepest = max((depths[name] for name in depths if quantized_tensor(name)), default=depth or _DEFAULT_DEPTH)
    report = ConvertReport(output, opened.name, deepest, recovery.encoder)
    report.warnings = [*opened.warnings, *loss_warning(opened, plan), *recovery.warnings]
    report.kept_unaligned = [tensor.name for tensor in plan if depths[tensor.name] and tensor.type_id == F16]
    squares = np.zeros(2)  # of the errors, of the weights
    metadata = file_metadata(opened, plan, recovery.encoder, choice.describe(depth or _DEFAULT_DEPTH))
    journal = Journal(output, job_of(opened, plan, metadata, importance, windows, crew.threads))
    with StreamingWriter(output, metadata, plan, overwrite=overwrite, journal=journal, resume=resume) as writer:
        rest = make_encoder(
            recovery.fallback,
            opened,
            wanted,
            crew,
            importance=importance,
            windows=text,
            written=partial(written_weights, writer),
        )
        written = stream(opened, writer, recovery.fits, rest, crew)
        for tensor, tensor_squares in zip(plan, written, strict=True):
            squares += tensor_squares
            counted.finished(tensor.name)
    _summarize(report, plan)
    report.relative_error = float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0
    report.seconds = time.perf_counter() - started
    return report


def _chosen_depths(
    source: Source,
    depths: Mapping[str, int],
    recovery: RecoveryPlan,
    choice: DepthChoice,
    depth: int,
    windows: Sequence[Sequence[int]] | None,
    crew: Crew,
) -> dict[str, int]:
    """Return the depths of the layers' matrices that are packed here and not recovered."""
    weights = {
        tensor.name: math.prod(tensor.shape)
        for tensor in source.tensors
        if quantized_tensor(tensor.name)
        and depths[tensor.name]
        and tensor.shape[-1] % trit_types.BLOCK_SIZE == 0
        and tensor.name not in recovery.fits
    }

    def measure(names: list[str], some_depths: Sequence[int]) -> Sensitivities:
        from tritgguf.calibration.sensitivity import measure_sensitivities

        if windows is None:
            raise TritGgufError("choosing depths by measurement needs a calibration text; give --text or --self")
        return measure_sensitivities(source, names, some_depths, windows[:_SENSITIVITY_WINDOWS], crew)

    return choice.depths(weights, depth, measure)


def _check_options(depth: int | None, output_depth: int | None, embedding_depth: int | None, encoder: str) -> None:
    if depth not in (None, *trit_types.DEPTHS):
        raise TritGgufError(f"depth {depth} does not exist; choose 1, 2, 3 or 4")
    for what, value in (("output", output_depth), ("embedding", embedding_depth)):
        if value not in (None, 0, *trit_types.DEPTHS):
            raise TritGgufError(f"{what} depth {value} does not exist; choose 1, 2, 3 or 4, or 0 for F16")
    if encoder not in encoder_names():
        raise TritGgufError(f"encoder {encoder} does not exist; choose from {', '.join(encoder_names())}")


def _plan_recovery(
    source: Source,
    depths: dict[str, int],
    encoder: str,
    depth: int | None,
    crew: Crew,
    progress: _Progress,
    default: str,
) -> RecoveryPlan:
    """Look for dequantized trits in the layers' matrices that are to be packed."""
    names = [
        tensor.name
        for tensor in source.tensors
        if quantized_tensor(tensor.name)
        and depths[tensor.name]
        and tensor.shape[-1] % trit_types.BLOCK_SIZE == 0
        and source.packed(tensor.name) is None
    ]
    return plan_recovery(source, names, encoder, depth or max(trit_types.DEPTHS), crew, progress.searched, default)


def _summarize(report: ConvertReport, plan: list[PlannedTensor]) -> None:
    packed_bytes = packed_weights = 0
    for tensor in plan:
        packed = trit_types.is_trit_type(tensor.type_id)
        name = TritType(tensor.type_id).name if packed else {F32: "F32", F16: "F16"}[tensor.type_id]
        weights = int(np.prod(tensor.shape, dtype=np.int64))
        report.tensors_by_type[name] = report.tensors_by_type.get(name, 0) + 1
        report.bytes_by_type[name] = report.bytes_by_type.get(name, 0) + tensor.n_bytes
        report.weights += weights
        if packed:
            packed_bytes, packed_weights = (packed_bytes + tensor.n_bytes, packed_weights + weights)
    report.file_bytes = report.output.stat().st_size
    report.bits_per_weight_quantized = 8 * packed_bytes / packed_weights if packed_weights else 0.0
    report.bits_per_weight_file = 8 * report.file_bytes / report.weights
    report.peak_memory_bytes = peak_memory_bytes()

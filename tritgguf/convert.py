"""Source -> packed GGUF, tensor by tensor.

One thread reads the next tensor and one writes the last ones, while the crew quantizes.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGUFValue, GGUFValueType, LlamaFileType

from cpu_kernels.crew import Crew
from cpu_kernels.unpack import dequantize
from tritgguf import trit_types
from tritgguf.architectures import quantized_tensor
from tritgguf.checkpoint import Source, open_source
from tritgguf.codec import DEFAULT_ENCODER
from tritgguf.convert_plan import block_of, job_of, loss_warning, planned_tensor, wanted_depths
from tritgguf.depth_plan import NO_CHOICE, DepthChoice, Sensitivities
from tritgguf.encoders import CALIBRATED, IMATRIX, Encoder, make_encoder
from tritgguf.errors import TritGgufError
from tritgguf.gguf_file import F16, F32
from tritgguf.gguf_writer import PlannedTensor, StreamingWriter, check_output
from tritgguf.hf_files import to_float32
from tritgguf.journal import Journal
from tritgguf.matrix_rows import MatrixRows
from tritgguf.memory import peak_memory_bytes
from tritgguf.recover import Fit
from tritgguf.recovery_plan import AUTOMATIC, RecoveryPlan, encoder_names, plan_recovery
from tritgguf.trit_types import TritType

_ROWS_AT_ONCE = 1 << 22  # weights of a kept tensor that are turned into halves at once
_UNWRITTEN_BYTES = 1 << 28  # of parts of tensors that wait to be written
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


@dataclass
class ConvertReport:
    """What a conversion wrote."""

    output: Path
    source: str
    depth: int
    encoder: str
    weights: int = 0
    tensors_by_type: dict[str, int] = field(default_factory=dict)
    bytes_by_type: dict[str, int] = field(default_factory=dict)
    bits_per_weight_quantized: float = 0.0
    """Bits in the file per weight, over the packed matrices; their codebooks are metadata."""
    bits_per_weight_file: float = 0.0
    relative_error: float = 0.0
    """Root of the summed squared error over the summed squared weights, over the matrices packed here."""
    kept_unaligned: list[str] = field(default_factory=list)
    """Matrices kept in F16 because their row length is no multiple of 64."""
    warnings: list[str] = field(default_factory=list)
    """What the source could not say exactly, such as an unknown pre-tokenizer, and what packing twice loses."""
    file_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0


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
        windows: the same for `calibrated`; a depth choice that measures needs them too.
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
    if recovery.fallback == CALIBRATED:
        plan.sort(key=lambda tensor: block_of(tensor.name))  # checkpoints may have the tenth block before the second
    wanted = {
        t.name: depths[t.name] for t in plan if trit_types.is_trit_type(t.type_id) and t.name not in recovery.fits
    }
    text = windows if recovery.fallback == CALIBRATED or not choice.needs_text else None
    deepest = max((depths[name] for name in depths if quantized_tensor(name)), default=depth or _DEFAULT_DEPTH)
    report = ConvertReport(output, opened.name, deepest, recovery.encoder)
    report.warnings = [*opened.warnings, *loss_warning(opened, plan), *recovery.warnings]
    report.kept_unaligned = [tensor.name for tensor in plan if depths[tensor.name] and tensor.type_id == F16]
    squares = np.zeros(2)  # of the errors, of the weights
    metadata = _metadata(opened, plan, recovery.encoder, choice.describe(depth or _DEFAULT_DEPTH))
    journal = Journal(output, job_of(opened, plan, metadata, importance, windows, crew.threads))
    with StreamingWriter(output, metadata, plan, overwrite=overwrite, journal=journal, resume=resume) as writer:
        rest = make_encoder(
            recovery.fallback,
            opened,
            wanted,
            crew,
            importance=importance,
            windows=text,
            written=partial(_written, writer),
        )
        written = _stream(opened, writer, recovery.fits, rest, crew)
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
        from tritgguf.sensitivity import measure_sensitivities

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


def _metadata(source: Source, plan: list[PlannedTensor], encoder: str, depths: str) -> dict[str, GGUFValue]:
    """Return the source's keys, then ours; codebooks hold zeros until their matrix is quantized."""
    metadata = dict(source.metadata)
    # The file mixes types that llama.cpp has no name for; "guessed" is its word for: look at the tensors.
    metadata["general.file_type"] = GGUFValue(int(LlamaFileType.GUESSED), GGUFValueType.UINT32)
    metadata["general.quantization_version"] = GGUFValue(2, GGUFValueType.UINT32)
    metadata[trit_types.KEY_VERSION] = GGUFValue(trit_types.FORMAT_VERSION, GGUFValueType.UINT32)
    metadata[trit_types.KEY_CODEC] = GGUFValue(trit_types.CODEC_NAME, GGUFValueType.STRING)
    metadata[trit_types.KEY_ENCODER] = GGUFValue(encoder, GGUFValueType.STRING)
    if depths:
        metadata[trit_types.KEY_DEPTHS] = GGUFValue(depths, GGUFValueType.STRING)
    metadata[trit_types.KEY_GROUP_SIZE] = GGUFValue(trit_types.GROUP_SIZE, GGUFValueType.UINT32)
    metadata[trit_types.KEY_SCALE_DEPTH] = GGUFValue(trit_types.SCALE_DEPTH, GGUFValueType.UINT32)
    for tensor in plan:
        if trit_types.is_trit_type(tensor.type_id):
            metadata[trit_types.codebook_key(tensor.name)] = _codebook_value([0.0] * trit_types.CODEBOOK_SIZE)
    for tensor in plan:
        metadata[trit_types.checksum_key(tensor.name)] = _checksum_value(0)
    return metadata


def _codebook_value(codebook: Sequence[float] | np.ndarray) -> GGUFValue:
    return GGUFValue([float(entry) for entry in codebook], GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


def _checksum_value(checksum: int) -> GGUFValue:
    return GGUFValue(checksum, GGUFValueType.UINT64)


@dataclass(frozen=True)
class _Encoded:
    """A tensor that is ready to be written.

    Attributes:
        parts: its rows in their order: bytes of the file, or the numbers of a tensor that is kept. Made as they are
            taken, where the tensor is too large to be held.
        codebook: float32 [27] of a trit tensor.
        squares: summed squared error and summed squared weights of the parts that were taken; zeros where nothing is
            quantized.

    """

    parts: Iterator[np.ndarray]
    codebook: np.ndarray | None = None
    squares: np.ndarray = field(default_factory=lambda: np.zeros(2))


def _stream(
    source: Source, writer: StreamingWriter, fits: Mapping[str, Fit], rest: Encoder, crew: Crew
) -> Iterator[np.ndarray]:
    """Read, encode and write the planned tensors; yield the squares of each when it is written.

    Not more than a few tensors that can be held are in memory, however much slower the disk is than the crew.
    """
    plan = writer.tensors[len(writer.resumed) :]
    for done in writer.resumed:
        _note(writer, done.name, done.checksum, done.codebook)
        yield np.array([done.squared_error, done.squared_weights])
    if not plan:
        return
    waiting: deque[tuple[Future[np.ndarray | None], int]] = deque()

    def written(most_bytes: int) -> Iterator[np.ndarray]:
        while waiting and (waiting[0][0].done() or sum(n_bytes for _, n_bytes in waiting) > most_bytes):
            squares = waiting.popleft()[0].result()
            if squares is not None:
                yield squares

    with _thread("reader") as reader, _thread("writer") as writing:
        reading = reader.submit(_read, source, plan[0], rest)
        for index, tensor in enumerate(plan):
            rows = reading.result()
            if index + 1 < len(plan):
                reading = reader.submit(_read, source, plan[index + 1], rest)
            encoded = _encode(source, tensor, rows, fits.get(tensor.name), rest, crew)
            del rows
            waiting.append((writing.submit(writer.begin, tensor), 0))
            for part in encoded.parts:
                waiting.append((writing.submit(_write, source, writer, tensor, part), part.nbytes))
                del part
                yield from written(_UNWRITTEN_BYTES)
            waiting.append((writing.submit(_finish, source, writer, tensor, encoded), 0))
            yield from written(_UNWRITTEN_BYTES)
        yield from written(-1)


@contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """Run a thread that drops what it has not begun when the block ends."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _read(source: Source, tensor: PlannedTensor, rest: Encoder) -> MatrixRows | _Encoded:
    """Read a tensor that can be held: its numbers, or what it is in the file if the source has just that.

    What an encoder reads by itself is left to it.
    """
    packed = source.packed(tensor.name)
    if packed is not None and TritType.of_depth(packed.depth) == tensor.type_id:
        return _Encoded(iter([packed.data]), packed.codebook)
    rows = source.rows(tensor.name)
    return rows.held() if rest.reads(tensor.name) else rows


def _encode(
    source: Source, tensor: PlannedTensor, rows: MatrixRows | _Encoded, fit: Fit | None, rest: Encoder, crew: Crew
) -> _Encoded:
    """Recover or quantize, and pack, what is to be packed."""
    if isinstance(rows, _Encoded):
        return rows
    if not trit_types.is_trit_type(tensor.type_id):
        return _Encoded(rows.blocks())
    with _damage_named(source, tensor):
        depth = TritType(tensor.type_id).depth
        quantized = rest.encode(tensor.name, rows, depth) if fit is None else fit.encode_rows(rows, crew)
    squares = np.zeros(2)

    def packed() -> Iterator[np.ndarray]:
        with _damage_named(source, tensor):
            for part in quantized.parts:
                squares[:] += part.squared_error, part.squared_weights
                yield part.pack(crew)

    return _Encoded(packed(), quantized.codebook, squares)


@contextmanager
def _damage_named(source: Source, tensor: PlannedTensor) -> Iterator[None]:
    """Say which tensor an encoder has refused."""
    try:
        yield
    except ValueError as error:
        raise TritGgufError(f"{source.name}: tensor {tensor.name} {error}; the checkpoint is damaged") from error


def _write(source: Source, writer: StreamingWriter, tensor: PlannedTensor, part: np.ndarray) -> None:
    """Write a part of the tensor that was begun."""
    if trit_types.is_trit_type(tensor.type_id):
        writer.write(part)
    else:
        _write_kept(writer, source, tensor, part)


def _finish(source: Source, writer: StreamingWriter, tensor: PlannedTensor, encoded: _Encoded) -> np.ndarray:
    """Complete a tensor whose parts are written, and return its squares."""
    error, power = encoded.squares.tolist()
    _note(writer, tensor.name, writer.end(encoded.codebook, (error, power)), encoded.codebook)
    source.release(tensor.name)
    return encoded.squares


def _written(writer: StreamingWriter, name: str) -> np.ndarray | None:
    """Return the weights of a matrix that an earlier run has written, decoded: float32 [rows, columns]; or None."""
    for index, (tensor, done) in enumerate(zip(writer.tensors, writer.resumed, strict=False)):
        if tensor.name == name and done.codebook is not None:
            rows = writer.read_back(index).reshape(tensor.shape[0], -1)
            return dequantize(rows, np.array(done.codebook, np.float32), TritType(tensor.type_id).depth)
    return None


def _note(writer: StreamingWriter, name: str, checksum: int, codebook: Sequence[float] | np.ndarray | None) -> None:
    """Put what is known of a tensor now into the header."""
    writer.set_metadata(trit_types.checksum_key(name), _checksum_value(checksum))
    if codebook is not None:
        writer.set_metadata(trit_types.codebook_key(name), _codebook_value(codebook))


def _write_kept(writer: StreamingWriter, source: Source, tensor: PlannedTensor, weights: np.ndarray) -> None:
    """Write a tensor that is not packed, a few rows at a time so that no second copy of it exists."""
    rows = weights.reshape(-1, tensor.shape[-1])
    step = max(1, _ROWS_AT_ONCE // tensor.shape[-1])
    dtype = np.dtype(np.float32 if tensor.type_id == F32 else np.float16)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if part.dtype != dtype:
            with np.errstate(over="ignore"):
                part = to_float32(part).astype(dtype, copy=False)
        if not _is_finite(part):
            raise TritGgufError(
                f"{source.name}: tensor {tensor.name} has a weight that is NaN, infinite or too large"
                " for F16; the checkpoint is damaged"
            )
        writer.write(part)


def _is_finite(weights: np.ndarray) -> bool:
    """Tell whether no weight, float32 or float16, is NaN or infinite."""
    if weights.dtype == np.float16:  # by their bits, which is ten times faster
        return bool((weights.view(np.uint16) & np.uint16(0x7FFF)).max() < 0x7C00)
    return bool(np.isfinite(weights).all())


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

"""The pipeline of a conversion: read, encode and write the tensors, one matrix of a stack at a time.

One thread reads the next matrix and another writes finished parts, while the thread pool quantizes. Several files of
one source are written together: each matrix is read once for all of them, and encoded once for those that encode it
alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from cpu_kernels.packed_rows.unpack import dequantize
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.conversion.encoders import MatrixEncoder, Quantizer, encode_alike
from tritgguf.conversion.file_metadata import checksum_value, codebook_value
from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.dtypes import to_float32
from tritgguf.formats.gguf_header import F32
from tritgguf.formats.gguf_writer import PlannedTensor, StreamingWriter
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.stacks import matrix_shape
from tritgguf.formats.trit_types import TritType
from tritgguf.quantization.recover import Fit
from tritgguf.sources.source import PackedMatrix, Source

_UNPACKED_WEIGHTS = 1 << 22  # weights of an unpacked matrix that are converted to F16 at once
_DEPTH_OPTIONS = {"token_embd.weight": "--embedding-depth", "output.weight": "--output-depth"}
_UNWRITTEN_BYTES = 1 << 28  # limit for encoded parts that wait to be written
_SHARED_WEIGHTS = 1 << 28  # a matrix of at most so many is held in memory if it is encoded more than once


@dataclass(frozen=True)
class _Matrix:
    """A matrix to write: a tensor's only one, or one of a stack."""

    tensor: PlannedTensor
    name: str
    is_first: bool
    is_last: bool

    @property
    def depth(self) -> int | None:
        """Trits per weight; None if it is not packed."""
        is_packed = trit_types.is_trit_type(self.tensor.type_id)
        return TritType(self.tensor.type_id).depth if is_packed else None


@dataclass(frozen=True)
class _Encoded:
    """A matrix that is ready to be written.

    Attributes:
        parts: its rows in order, as packed bytes or as the weights of an unpacked matrix. The iterator may encode them
            lazily, so that a large matrix is never in memory as a whole.
        codebook: float32 [27] of a packed matrix.
        squares: summed squared error and summed squared weights of the parts consumed so far; zeros if nothing is
            quantized.

    """

    parts: Iterator[np.ndarray]
    codebook: np.ndarray | None = None
    squares: np.ndarray = field(default_factory=lambda: np.zeros(2))


@dataclass(frozen=True)
class Output:
    """A file to write: the matrices to recover, and what encodes the others."""

    writer: StreamingWriter
    fits: Mapping[str, Fit]
    quantizer: Quantizer
    encoder: MatrixEncoder


@dataclass(frozen=True)
class _Task:
    """A matrix that an output, by its number, still lacks."""

    number: int
    output: Output
    header: _HeaderEntries
    matrix: _Matrix

    def packed_in(self, source: Source) -> PackedMatrix | None:
        """Return the matrix if the source already has it in the planned type; None if it has not."""
        packed = source.packed(self.matrix.name)
        return packed if packed is not None and packed.depth == self.matrix.depth else None

    def encodes_like(self, other: _Task) -> bool:
        """Tell whether both tasks give the same bytes."""
        if self.matrix.tensor.type_id != other.matrix.tensor.type_id:
            return False
        name = self.matrix.name
        is_plain = name not in self.output.fits and name not in other.output.fits
        return self.matrix.depth is None or (is_plain and encode_alike(self.output.quantizer, other.output.quantizer))


Written = tuple[int, str, np.ndarray]
"""The number of an output, a matrix that it now has, and this matrix's squared error and squared weights."""


def encode_and_write(source: Source, outputs: Sequence[Output], thread_pool: ThreadPool) -> Generator[Written]:
    """Read, encode and write the planned tensors of outputs that have the same matrices in the same order.

    Memory holds only a few matrices, even if the disk is slower than the thread pool.
    """
    tasks = [
        [_Task(number, output, header, matrix) for tensor in output.writer.tensors for matrix in _matrices(tensor)]
        for number, (output, header) in enumerate((output, _HeaderEntries(output.writer)) for output in outputs)
    ]
    for output, of_output in zip(outputs, tasks, strict=True):
        for task, done in zip(of_output, output.writer.resumed, strict=False):
            task.header.add(task.matrix, done.checksum, done.codebook)
            yield task.number, task.matrix.name, np.array([done.squared_error, done.squared_weights])
    steps = [
        missing
        for place, step in enumerate(zip(*tasks, strict=True))
        if (missing := [task for task in step if place >= len(task.output.writer.resumed)])
    ]
    if not steps:
        return
    waiting: deque[tuple[Future[Written | None], int]] = deque()

    def written(max_waiting_bytes: int) -> Iterator[Written]:
        while waiting and (waiting[0][0].done() or sum(n_bytes for _, n_bytes in waiting) > max_waiting_bytes):
            finished = waiting.popleft()[0].result()
            if finished is not None:
                yield finished

    with _thread("reader") as reader, _thread("writer") as writing:
        reading = reader.submit(_read, source, steps[0])
        for index, step in enumerate(steps):
            rows = reading.result()
            if index + 1 < len(steps):
                reading = reader.submit(_read, source, steps[index + 1])
            for tasks_of_bytes in _alike(step):
                encoded = _encode(source, tasks_of_bytes[0], rows, thread_pool)
                for task in tasks_of_bytes:
                    if task.matrix.is_first:
                        waiting.append((writing.submit(task.output.writer.begin, task.matrix.tensor), 0))
                for part in encoded.parts:
                    waiting.append((writing.submit(_write, source, tasks_of_bytes, part), part.nbytes))
                    del part
                    yield from written(_UNWRITTEN_BYTES)
                for task in tasks_of_bytes:
                    waiting.append((writing.submit(_finish, source, task, encoded), 0))
                yield from written(_UNWRITTEN_BYTES)
            del rows
        yield from written(-1)


def _alike(tasks: Sequence[_Task]) -> list[list[_Task]]:
    """Group tasks for one matrix that give the same bytes."""
    groups: list[list[_Task]] = []
    for task in tasks:
        group = next((group for group in groups if task.encodes_like(group[0])), None)
        if group is None:
            groups.append([task])
        else:
            group.append(task)
    return groups


def _matrices(tensor: PlannedTensor) -> list[_Matrix]:
    names = tensor.matrices
    return [_Matrix(tensor, name, name == names[0], name == names[-1]) for name in names]


class _HeaderEntries:
    """The header's checksums and codebooks, which are complete when the last matrix of a tensor is written."""

    def __init__(self, writer: StreamingWriter) -> None:
        self._writer = writer
        self._codebooks: list[np.ndarray] = []  # of the matrices of the current tensor

    def add(self, matrix: _Matrix, checksum: int, codebook: Sequence[float] | np.ndarray | None) -> None:
        """Take over the entries of the next written matrix; `checksum` is that of its tensor's bytes so far."""
        name = matrix.tensor.name
        if codebook is not None:
            self._codebooks.append(np.asarray(codebook, np.float32))
        if not matrix.is_last:
            return
        self._writer.set_metadata(trit_types.checksum_key(name), checksum_value(checksum))
        if self._codebooks:
            self._writer.set_metadata(trit_types.codebook_key(name), codebook_value(np.concatenate(self._codebooks)))
        self._codebooks.clear()


@contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """Run a worker thread; at the end of the context, tasks that have not started are cancelled."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _read(source: Source, tasks: Sequence[_Task]) -> MatrixRows:
    """Return a matrix's rows, which are in memory if an encoder uses them.

    One that is too large for that is read again for each group of tasks.
    """
    name = tasks[0].matrix.name
    rows = source.rows(name)
    encoded = [task for task in tasks if task.packed_in(source) is None]
    if not any(task.output.encoder.needs_weights(name) for task in encoded):
        return rows
    return rows.held(_SHARED_WEIGHTS) if len(_alike(encoded)) > 1 else rows.held()


def _encode(source: Source, task: _Task, rows: MatrixRows, thread_pool: ThreadPool) -> _Encoded:
    """Recover or quantize a matrix and pack it, if the plan packs it; copy it if it is packed already."""
    matrix, output = task.matrix, task.output
    if (packed_matrix := task.packed_in(source)) is not None:
        return _Encoded(iter([packed_matrix.data]), packed_matrix.codebook)
    if matrix.depth is None:
        replacement = output.encoder.replacement(matrix.name)
        return _Encoded(rows.blocks() if replacement is None else iter([replacement]))
    fit = output.fits.get(matrix.name)
    with _matrix_named(source, matrix):
        quantized = (
            output.encoder.encode(matrix.name, rows, matrix.depth)
            if fit is None
            else fit.encode_rows(rows, thread_pool)
        )
    squares = np.zeros(2)

    def packed() -> Iterator[np.ndarray]:
        with _matrix_named(source, matrix):
            for part in quantized.parts:
                squares[:] += part.squared_error, part.squared_weights
                yield part.pack(thread_pool)

    return _Encoded(packed(), quantized.codebook, squares)


@contextmanager
def _matrix_named(source: Source, matrix: _Matrix) -> Iterator[None]:
    """Turn an encoder's ValueError into a TritGgufError that names the matrix."""
    try:
        yield
    except ValueError as error:
        raise TritGgufError(
            f"{source.name}: tensor {source.label(matrix.name)} {error}; the checkpoint is damaged"
        ) from error


def _write(source: Source, tasks: Sequence[_Task], part: np.ndarray) -> None:
    """Write a part of the current matrix into every output of the tasks."""
    for task in tasks:
        if task.matrix.depth is not None:
            task.output.writer.write(part)
        else:
            _write_unpacked(task.output.writer, source, task.matrix, part)


def _finish(source: Source, task: _Task, encoded: _Encoded) -> Written:
    """Complete a matrix after its parts are written."""
    error, power = encoded.squares.tolist()
    checksum = task.output.writer.end(encoded.codebook, (error, power))
    task.header.add(task.matrix, checksum, encoded.codebook)
    source.release(task.matrix.name)
    return task.number, task.matrix.name, encoded.squares


def written_weights(writer: StreamingWriter, name: str) -> np.ndarray | None:
    """Return the decoded weights, float32 [rows, columns], of a matrix that an interrupted run has written, or None."""
    plan = ((tensor, matrix) for tensor in writer.tensors for matrix in tensor.matrices)
    for index, ((tensor, matrix), done) in enumerate(zip(plan, writer.resumed, strict=False)):
        if matrix == name and done.codebook is not None:
            rows = writer.read_back(index, tensor.matrix_bytes).reshape(matrix_shape(tensor.shape)[0], -1)
            return dequantize(rows, np.array(done.codebook, np.float32), TritType(tensor.type_id).depth)
    return None


def _write_unpacked(writer: StreamingWriter, source: Source, matrix: _Matrix, weights: np.ndarray) -> None:
    """Write a matrix that is not packed, a few rows at a time to avoid a second copy in memory."""
    rows = weights.reshape(-1, matrix.tensor.shape[-1])
    step = max(1, _UNPACKED_WEIGHTS // matrix.tensor.shape[-1])
    dtype = np.dtype(np.float32 if matrix.tensor.type_id == F32 else np.float16)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if part.dtype != dtype:
            with np.errstate(over="ignore"):
                part = to_float32(part).astype(dtype, copy=False)
        if not _is_finite(part):
            raise _unwritable(source, matrix, to_float32(rows[start : start + step]))
        writer.write(part)


def _unwritable(source: Source, matrix: _Matrix, weights: np.ndarray) -> TritGgufError:
    """Return the error for float32 weights that are damaged or that F16 cannot hold."""
    name = f"{source.name}: tensor {source.label(matrix.name)}"
    if not np.isfinite(weights).all():
        return TritGgufError(f"{name} has a weight that is NaN or infinite; the checkpoint is damaged, fetch it again")
    option = _DEPTH_OPTIONS.get(matrix.name)
    remedy = f"{option} 4 stores it in trits, which can" if option else "scale the model down to less than that"
    return TritGgufError(f"{name} has a weight of {np.abs(weights).max():g}, but F16 holds 65504 at most; {remedy}")


def _is_finite(weights: np.ndarray) -> bool:
    """Return whether all weights, float32 or float16, are finite."""
    if weights.dtype == np.float16:  # testing the bits is ten times faster than isfinite
        return bool((weights.view(np.uint16) & np.uint16(0x7FFF)).max() < 0x7C00)
    return bool(np.isfinite(weights).all())

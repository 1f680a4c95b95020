"""The pipeline of a conversion: read, encode and write the tensors.

One thread reads the next tensor and another writes finished parts, while the thread pool quantizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from cpu_kernels.packed_rows.unpack import dequantize
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.conversion.encoders import MatrixEncoder
from tritgguf.conversion.file_metadata import checksum_value, codebook_value
from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.dtypes import to_float32
from tritgguf.formats.gguf_header import F32
from tritgguf.formats.gguf_writer import PlannedTensor, StreamingWriter
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.trit_types import TritType
from tritgguf.quantization.recover import Fit
from tritgguf.sources.source import Source

_UNPACKED_WEIGHTS = 1 << 22  # weights of an unpacked tensor that are converted to F16 at once
_DEPTH_OPTIONS = {"token_embd.weight": "--embedding-depth", "output.weight": "--output-depth"}
_UNWRITTEN_BYTES = 1 << 28  # limit for encoded parts that wait to be written


@dataclass(frozen=True)
class _Encoded:
    """A tensor that is ready to be written.

    Attributes:
        parts: its rows in order, as packed bytes or as the weights of an unpacked tensor. The iterator may encode them
            lazily, so that a large tensor is never in memory as a whole.
        codebook: float32 [27] of a trit tensor.
        squares: summed squared error and summed squared weights of the parts consumed so far; zeros if nothing is
            quantized.

    """

    parts: Iterator[np.ndarray]
    codebook: np.ndarray | None = None
    squares: np.ndarray = field(default_factory=lambda: np.zeros(2))


def encode_and_write(
    source: Source, writer: StreamingWriter, fits: Mapping[str, Fit], encoder: MatrixEncoder, thread_pool: ThreadPool
) -> Iterator[np.ndarray]:
    """Read, encode and write the planned tensors; yield the squares of each tensor after it is written.

    `fits` are the matrices to recover; `encoder` quantizes the others. Memory holds only a few tensors, even if the
    disk is slower than the thread pool.
    """
    plan = writer.tensors[len(writer.resumed) :]
    for done in writer.resumed:
        _set_header_entries(writer, done.name, done.checksum, done.codebook)
        yield np.array([done.squared_error, done.squared_weights])
    if not plan:
        return
    waiting: deque[tuple[Future[np.ndarray | None], int]] = deque()

    def written(max_waiting_bytes: int) -> Iterator[np.ndarray]:
        while waiting and (waiting[0][0].done() or sum(n_bytes for _, n_bytes in waiting) > max_waiting_bytes):
            squares = waiting.popleft()[0].result()
            if squares is not None:
                yield squares

    with _thread("reader") as reader, _thread("writer") as writing:
        reading = reader.submit(_read, source, plan[0], encoder)
        for index, tensor in enumerate(plan):
            rows = reading.result()
            if index + 1 < len(plan):
                reading = reader.submit(_read, source, plan[index + 1], encoder)
            encoded = _encode(source, tensor, rows, fits.get(tensor.name), encoder, thread_pool)
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
    """Run a worker thread; at the end of the context, tasks that have not started are cancelled."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _read(source: Source, tensor: PlannedTensor, encoder: MatrixEncoder) -> MatrixRows | _Encoded:
    """Read a tensor's weights, or its packed bytes if the source already has the planned type.

    The weights are not loaded if the encoder reads the tensor itself.
    """
    packed = source.packed(tensor.name)
    if packed is not None and TritType.of_depth(packed.depth) == tensor.type_id:
        return _Encoded(iter([packed.data]), packed.codebook)
    rows = source.rows(tensor.name)
    return rows.held() if encoder.needs_weights(tensor.name) else rows


def _encode(
    source: Source,
    tensor: PlannedTensor,
    rows: MatrixRows | _Encoded,
    fit: Fit | None,
    encoder: MatrixEncoder,
    thread_pool: ThreadPool,
) -> _Encoded:
    """Recover or quantize a tensor and pack it, if the plan packs it."""
    if isinstance(rows, _Encoded):
        return rows
    if not trit_types.is_trit_type(tensor.type_id):
        return _Encoded(rows.blocks())
    with _tensor_named(source, tensor):
        depth = TritType(tensor.type_id).depth
        quantized = encoder.encode(tensor.name, rows, depth) if fit is None else fit.encode_rows(rows, thread_pool)
    squares = np.zeros(2)

    def packed() -> Iterator[np.ndarray]:
        with _tensor_named(source, tensor):
            for part in quantized.parts:
                squares[:] += part.squared_error, part.squared_weights
                yield part.pack(thread_pool)

    return _Encoded(packed(), quantized.codebook, squares)


@contextmanager
def _tensor_named(source: Source, tensor: PlannedTensor) -> Iterator[None]:
    """Turn an encoder's ValueError into a TritGgufError that names the tensor."""
    try:
        yield
    except ValueError as error:
        raise TritGgufError(
            f"{source.name}: tensor {source.label(tensor.name)} {error}; the checkpoint is damaged"
        ) from error


def _write(source: Source, writer: StreamingWriter, tensor: PlannedTensor, part: np.ndarray) -> None:
    """Write a part of the current tensor."""
    if trit_types.is_trit_type(tensor.type_id):
        writer.write(part)
    else:
        _write_unpacked(writer, source, tensor, part)


def _finish(source: Source, writer: StreamingWriter, tensor: PlannedTensor, encoded: _Encoded) -> np.ndarray:
    """Complete a tensor after its parts are written, and return its squares."""
    error, power = encoded.squares.tolist()
    _set_header_entries(writer, tensor.name, writer.end(encoded.codebook, (error, power)), encoded.codebook)
    source.release(tensor.name)
    return encoded.squares


def written_weights(writer: StreamingWriter, name: str) -> np.ndarray | None:
    """Return the decoded weights, float32 [rows, columns], of a matrix that an interrupted run has written, or None."""
    for index, (tensor, done) in enumerate(zip(writer.tensors, writer.resumed, strict=False)):
        if tensor.name == name and done.codebook is not None:
            rows = writer.read_back(index).reshape(tensor.shape[0], -1)
            return dequantize(rows, np.array(done.codebook, np.float32), TritType(tensor.type_id).depth)
    return None


def _set_header_entries(
    writer: StreamingWriter, name: str, checksum: int, codebook: Sequence[float] | np.ndarray | None
) -> None:
    """Set the checksum and the codebook of a written tensor in the header."""
    writer.set_metadata(trit_types.checksum_key(name), checksum_value(checksum))
    if codebook is not None:
        writer.set_metadata(trit_types.codebook_key(name), codebook_value(codebook))


def _write_unpacked(writer: StreamingWriter, source: Source, tensor: PlannedTensor, weights: np.ndarray) -> None:
    """Write a tensor that is not packed, a few rows at a time to avoid a second copy in memory."""
    rows = weights.reshape(-1, tensor.shape[-1])
    step = max(1, _UNPACKED_WEIGHTS // tensor.shape[-1])
    dtype = np.dtype(np.float32 if tensor.type_id == F32 else np.float16)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if part.dtype != dtype:
            with np.errstate(over="ignore"):
                part = to_float32(part).astype(dtype, copy=False)
        if not _is_finite(part):
            raise _unwritable(source, tensor, to_float32(rows[start : start + step]))
        writer.write(part)


def _unwritable(source: Source, tensor: PlannedTensor, weights: np.ndarray) -> TritGgufError:
    """Return the error for float32 weights that are damaged or that F16 cannot hold."""
    name = f"{source.name}: tensor {source.label(tensor.name)}"
    if not np.isfinite(weights).all():
        return TritGgufError(f"{name} has a weight that is NaN or infinite; the checkpoint is damaged, fetch it again")
    option = _DEPTH_OPTIONS.get(tensor.name)
    remedy = f"{option} 4 stores it in trits, which can" if option else "scale the model down to less than that"
    return TritGgufError(f"{name} has a weight of {np.abs(weights).max():g}, but F16 holds 65504 at most; {remedy}")


def _is_finite(weights: np.ndarray) -> bool:
    """Return whether all weights, float32 or float16, are finite."""
    if weights.dtype == np.float16:  # testing the bits is ten times faster than isfinite
        return bool((weights.view(np.uint16) & np.uint16(0x7FFF)).max() < 0x7C00)
    return bool(np.isfinite(weights).all())

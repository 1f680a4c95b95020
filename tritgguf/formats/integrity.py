"""Integrity check of a trit file: structure, codebooks, packed words and checksums.

Opening the file checks its header (`gguf_file`). Then every tensor is read once, in chunks that stay in the cache while
they are hashed and their words are checked. Threads work on tensors in parallel, the largest first. Chunks are read,
not mapped: copying costs less than page faults (`docs/safety.md`), and a file that is truncated during the check gives
an error.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from cpu_kernels.packed_rows.check_words import first_damaged_row, first_not_finite
from cpu_kernels.threads.cores import physical_cores
from tritgguf.errors import DamagedFileError, TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import F16, F32, TensorInfo
from tritgguf.formats.trit_types import TritType

_CHUNK_BYTES = 1 << 20
_EXPONENTS = {F16: (np.uint16, 0x7C00), F32: (np.uint32, 0x7F800000)}
_REMEDY = "the file is damaged, fetch or convert it again"


@dataclass(frozen=True)
class CheckReport:
    """What `check` checked without finding damage."""

    file: Path
    tensors: int
    trit_tensors: int
    checksums: int
    """Number of tensors with a checksum; stock files and files of earlier versions have none."""
    stock: bool
    """Whether another program wrote the file, so that its structure and the weights in F16 and F32 are all there is."""
    file_bytes: int
    seconds: float
    bytes_per_second: float
    """Rate of checking tensors, without the time to open the file, which does not depend on their size."""


def check(
    path: str | Path, *, threads: int | None = None, progress: Callable[[int, int], None] | None = None
) -> CheckReport:
    """Check a file that `convert` wrote.

    Args:
        path: the file.
        threads: number of threads; None for one per physical core.
        progress: called with the bytes checked so far and in total.

    Raises:
        TritGgufError: the file is damaged; the message names the file, the tensor and, for trits, the row.

    """
    started = time.perf_counter()
    file = GgufFile(path)
    tensors = sorted(file.tensors.values(), key=lambda info: info.n_bytes, reverse=True)
    _check_names(file)
    total, done = sum(info.n_bytes for info in tensors), 0
    for info in tensors:
        if trit_types.is_trit_type(info.type_id):
            _check_codebooks(file, info.name)
    chunks, opened = _ChunkReader(file.path), time.perf_counter()
    pool = ThreadPoolExecutor(threads or physical_cores(), thread_name_prefix="check")
    try:
        for info, _ in zip(tensors, pool.map(partial(_check_tensor, file, chunks), tensors), strict=True):
            done += info.n_bytes
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    ended = time.perf_counter()
    return CheckReport(
        file=Path(path),
        tensors=len(tensors),
        trit_tensors=sum(trit_types.is_trit_type(info.type_id) for info in tensors),
        checksums=sum(trit_types.checksum_key(info.name) in file.metadata for info in tensors),
        stock=trit_types.KEY_VERSION not in file.metadata,
        file_bytes=Path(path).stat().st_size,
        seconds=ended - started,
        bytes_per_second=total / (ended - opened),
    )


def _check_names(file: GgufFile) -> None:
    """Check that a file with checksums has one for each tensor, and no other: names may be damaged, too."""
    prefix = trit_types.CHECKSUM_PREFIX
    summed = {key.removeprefix(prefix) for key in file.metadata if key.startswith(prefix)}
    if not summed:
        return
    for name in sorted(summed - file.tensors.keys()):
        raise DamagedFileError(f"{file.path}: has a checksum of tensor {name}, but no such tensor; {_REMEDY}")
    for name in sorted(file.tensors.keys() - summed):
        raise DamagedFileError(f"{file.path}: tensor {name} has no checksum, unlike others; {_REMEDY}")


def _check_codebooks(file: GgufFile, name: str) -> None:
    """Check that every codebook ascends, which decoders do not rely on; `GgufFile.stored_codebooks` checks the rest."""
    if (np.diff(file.stored_codebooks(name)) < 0).any():
        raise DamagedFileError(f"{file.path}: the codebook of tensor {name} is not ascending; {_REMEDY}")


class _ChunkReader(threading.local):
    """Reads tensors of a file in chunks, into one buffer per thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._buffer = np.empty(0, np.uint8)

    def read(self, info: TensorInfo, row_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield chunks of whole rows: the offset in the tensor and the bytes, valid until the next chunk."""
        step = max(1, _CHUNK_BYTES // row_bytes) * row_bytes
        if len(self._buffer) < min(step, info.n_bytes):
            self._buffer = np.empty(step, np.uint8)
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(info.offset)
                for start in range(0, info.n_bytes, step):
                    chunk = self._buffer[: min(step, info.n_bytes - start)]
                    self._fill(chunk.data, file, info.name)
                    yield start, chunk
        except OSError as error:
            raise TritGgufError(f"{self._path}: tensor {info.name} cannot be read ({error.strerror})") from error

    def _fill(self, chunk: memoryview, file: io.FileIO, name: str) -> None:
        while chunk:
            count = file.readinto(chunk)
            if not count:
                raise DamagedFileError(f"{self._path}: ends inside tensor {name}; {_REMEDY}")
            chunk = chunk[count:]


def _check_tensor(file: GgufFile, chunks: _ChunkReader, info: TensorInfo) -> None:
    row_bytes, digest = info.row_bytes, xxhash.xxh3_64()
    for start, chunk in chunks.read(info, row_bytes):
        digest.update(chunk.data)
        if trit_types.is_trit_type(info.type_id):
            row = first_damaged_row(chunk.view(np.uint16).reshape(-1, row_bytes // 2), TritType(info.type_id).depth)
            if row >= 0:
                raise DamagedFileError(
                    f"{file.path}: tensor {info.name}, row {start // row_bytes + row} has a word that no encoder"
                    f" writes; {_REMEDY}"
                )
        elif info.type_id in _EXPONENTS:
            bits, exponent = _EXPONENTS[info.type_id]
            index = first_not_finite(chunk.view(bits), exponent)
            if index >= 0:
                index += start * info.n_weights // info.n_bytes
                raise DamagedFileError(f"{file.path}: tensor {info.name}, weight {index} is NaN or infinite; {_REMEDY}")
    expected = file.metadata.get(trit_types.checksum_key(info.name))
    if expected is not None and expected != digest.intdigest():
        raise DamagedFileError(f"{file.path}: tensor {info.name} does not match its checksum; {_REMEDY}")

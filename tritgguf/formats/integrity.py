"""Is a trit file as it was written? Structure, codebooks, every word, and checksums.

Opening the file checks its header, see `gguf_file`. Here every tensor is read once, in pieces that stay in the cache
while they are hashed and their words are looked at; threads take tensors, the largest first. The pieces are read, not
mapped: copying them costs less than the page faults of a map (`docs/safety.md`), and a file that somebody shortens
meanwhile gives an error.
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

_BYTES_AT_ONCE = 1 << 20
_EXPONENTS = {F16: (np.uint16, 0x7C00), F32: (np.uint32, 0x7F800000)}
_REMEDY = "the file is damaged, fetch or convert it again"


@dataclass(frozen=True)
class CheckReport:
    """What `check` has looked at and found whole."""

    file: Path
    tensors: int
    trit_tensors: int
    checksums: int
    """Tensors that have one; files of earlier versions have none."""
    file_bytes: int
    seconds: float
    bytes_per_second: float
    """How fast tensors were read; opening the file is left out, which takes as long whatever their size."""


def check(
    path: str | Path, *, threads: int | None = None, progress: Callable[[int, int], None] | None = None
) -> CheckReport:
    """Check a file that `convert` wrote.

    Args:
        path: the file.
        threads: processor cores to use; None for all.
        progress: called with the bytes that are checked and those in all.

    Raises:
        TritGgufError: the file is damaged; names the file, the tensor and, of trits, the row.

    """
    started = time.perf_counter()
    file = GgufFile(path)
    tensors = sorted(file.tensors.values(), key=lambda info: info.n_bytes, reverse=True)
    total, done = sum(info.n_bytes for info in tensors), 0
    for info in tensors:
        if trit_types.is_trit_type(info.type_id):
            _check_codebook(file, info.name)
    pieces, opened = _Pieces(file.path), time.perf_counter()
    pool = ThreadPoolExecutor(threads or physical_cores(), thread_name_prefix="check")
    try:
        for info, _ in zip(tensors, pool.map(partial(_check_tensor, file, pieces), tensors), strict=True):
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
        file_bytes=Path(path).stat().st_size,
        seconds=ended - started,
        bytes_per_second=total / (ended - opened),
    )


def _check_codebook(file: GgufFile, name: str) -> None:
    """Check what an encoder promises and a decoder need not rely on; `GgufFile.codebook` checks the rest."""
    codebook = file.codebook(name)
    if (np.diff(codebook) < 0).any():
        raise DamagedFileError(f"{file.path}: the codebook of tensor {name} is not ascending; {_REMEDY}")


class _Pieces(threading.local):
    """Reads a file's tensors piece by piece, into one buffer for each thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._buffer = np.empty(0, np.uint8)

    def of(self, info: TensorInfo, row_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield where in the tensor whole rows begin, and their bytes, which stay until the next are asked for."""
        step = max(1, _BYTES_AT_ONCE // row_bytes) * row_bytes
        if len(self._buffer) < min(step, info.n_bytes):
            self._buffer = np.empty(step, np.uint8)
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(info.offset)
                for start in range(0, info.n_bytes, step):
                    part = self._buffer[: min(step, info.n_bytes - start)]
                    self._fill(part.data, file, info.name)
                    yield start, part
        except OSError as error:
            raise TritGgufError(f"{self._path}: tensor {info.name} cannot be read ({error.strerror})") from error

    def _fill(self, part: memoryview, file: io.FileIO, name: str) -> None:
        while part:
            count = file.readinto(part)
            if not count:
                raise DamagedFileError(f"{self._path}: ends inside tensor {name}; {_REMEDY}")
            part = part[count:]


def _check_tensor(file: GgufFile, pieces: _Pieces, info: TensorInfo) -> None:
    row_bytes, digest = info.n_bytes * info.shape[-1] // info.n_weights, xxhash.xxh3_64()
    for start, part in pieces.of(info, row_bytes):
        digest.update(part.data)
        if trit_types.is_trit_type(info.type_id):
            row = first_damaged_row(part.view(np.uint16).reshape(-1, row_bytes // 2), TritType(info.type_id).depth)
            if row >= 0:
                raise DamagedFileError(
                    f"{file.path}: tensor {info.name}, row {start // row_bytes + row} has a word that no encoder"
                    f" writes; {_REMEDY}"
                )
        elif info.type_id in _EXPONENTS:
            bits, exponent = _EXPONENTS[info.type_id]
            place = first_not_finite(part.view(bits), exponent)
            if place >= 0:
                place += start * info.n_weights // info.n_bytes
                raise DamagedFileError(f"{file.path}: tensor {info.name}, weight {place} is NaN or infinite; {_REMEDY}")
    stated = file.metadata.get(trit_types.checksum_key(info.name))
    if stated is not None and stated != digest.intdigest():
        raise DamagedFileError(f"{file.path}: tensor {info.name} does not match its checksum; {_REMEDY}")

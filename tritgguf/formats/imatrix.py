"""llama.cpp's importance matrices: the mean squared input of every column of a matrix.

Two formats can be read: GGUF, with tensors `NAME.in_sum2` (sums of squares) and `NAME.counts` (number of inputs), and
the older `.dat`, a list of names and mean squares times the number of calls. Only GGUF is written. Both formats are
those of llama.cpp's tools/imatrix and llama-quantize. A stack of experts has a row of sums and a count for each expert,
which sees only the tokens that are routed to it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tritgguf.errors import DamagedFileError, TritGgufError
from tritgguf.formats.durable_output import check_output, disk_errors, sync_folder
from tritgguf.formats.file_kinds import HEAD_BYTES, foreign_kind, is_lfs_pointer
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import F32, MAGIC
from tritgguf.formats.stacks import by_tensor

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_ENTRIES = 1 << 20
_MAX_NAME_BYTES = 1 << 16


def read_importance(
    path: str | Path, columns: Mapping[str, int], unknown: list[str] | None = None
) -> dict[str, np.ndarray]:
    """Read the importance of some matrices.

    Args:
        path: a GGUF or `.dat` file of llama.cpp's `imatrix` or of `tritgguf calibrate`.
        columns: name (see `stacks`) -> columns of the matrices to read; others in the file are ignored.
        unknown: if given, the GGUF names of those others are appended.

    Returns:
        Name -> float32 [columns], for the matrices that the file contains with at least one input.

    Raises:
        TritGgufError: the file is damaged, is not an importance matrix, is of another model, or lacks all matrices.

    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise TritGgufError(f"{path}: {error.strerror}; give an importance matrix") from error
    if is_lfs_pointer(head):
        raise DamagedFileError(f"{path}: {foreign_kind(head)}")
    tensors = by_tensor(columns)
    found = {}
    for name, importance in _from_gguf(path, tensors) if head.startswith(MAGIC) else _from_dat(path, tensors):
        if name not in columns:
            if unknown is not None:
                unknown.append(name)
            continue
        if importance.shape != (columns[name],):
            raise DamagedFileError(
                f"{path}: {name} has {importance.size} columns, but {columns[name]} in the model; this importance"
                " matrix is of another model"
            )
        if not (np.isfinite(importance).all() and importance.min(initial=0) >= 0):
            raise DamagedFileError(
                f"{path}: {name} has a mean square that is negative or not a number; make the file again"
            )
        found[name] = importance.astype(np.float32)
    if not found:
        raise DamagedFileError(
            f"{path}: contains none of the model's matrices; this importance matrix is of another model"
        )
    return found


def _from_gguf(path: Path, tensors: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, np.ndarray]]:
    file = GgufFile(path)
    if file.metadata.get("general.type") != "imatrix":
        raise DamagedFileError(f"{path}: is a GGUF file, but not an importance matrix (general.type is not imatrix)")
    in_file = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    yield from ((name, np.empty(0)) for name in in_file if name not in tensors)
    for tensor, matrices in tensors.items():
        sums, counts = file.tensors.get(tensor + _SUMS), file.tensors.get(tensor + _COUNTS)
        if sums is None and counts is None:
            continue
        if sums is None or counts is None or sums.type_id != F32 or counts.type_id != F32:
            raise DamagedFileError(f"{path}: {tensor} needs one tensor {_SUMS} and one {_COUNTS}, both F32")
        if counts.n_weights != len(matrices):
            raise DamagedFileError(
                f"{path}: {tensor} has {counts.n_weights} counts for {len(matrices)} matrices; this importance matrix"
                " is of another model"
            )
        numbers = file.read_float32(counts.name).reshape(-1)
        if np.isnan(numbers).any():
            raise DamagedFileError(f"{path}: {tensor}{_COUNTS} is not a number; make the file again")
        rows = _split(file.read_float32(sums.name), len(matrices), path, tensor)
        for name, row, count in zip(matrices, rows, numbers, strict=True):
            if count > 0:
                yield name, row / np.float64(count)


def _split(values: np.ndarray, matrices: int, path: Path, tensor: str) -> np.ndarray:
    """Return the values of each matrix of a tensor: [matrices, columns]."""
    if values.size % matrices:
        raise DamagedFileError(
            f"{path}: {tensor} has {values.size} columns for {matrices} matrices; this importance matrix is of another"
            " model"
        )
    return values.reshape(matrices, -1)


def _from_dat(path: Path, tensors: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, np.ndarray]]:
    remaining = path.stat().st_size

    with path.open("rb") as file:

        def take(size: int) -> bytes:
            nonlocal remaining
            if not 0 <= size <= remaining:
                raise DamagedFileError(f"{path}: is not an importance matrix, or is truncated; fetch or make it again")
            remaining -= size
            return file.read(size)

        def number(most: int) -> int:
            (value,) = struct.unpack("<i", take(4))
            if not 0 <= value <= most:
                raise DamagedFileError(
                    f"{path}: is not an importance matrix (a count of {value}); fetch or make it again"
                )
            return int(value)

        for _ in range(number(_MAX_ENTRIES)):
            name = take(number(_MAX_NAME_BYTES)).decode("utf-8", "replace")
            calls, size = number((1 << 31) - 1), number((1 << 31) - 1)
            values = np.frombuffer(take(4 * size), "<f4")
            if calls > 0:
                matrices = tensors.get(name, [name])
                yield from zip(matrices, _split(values / np.float64(calls), len(matrices), path, name), strict=True)


def write_importance(
    path: str | Path,
    sums: Mapping[str, np.ndarray],
    counts: Mapping[str, int],
    *,
    datasets: Sequence[str],
    chunk_size: int,
    chunks: int,
    overwrite: bool = False,
) -> None:
    """Write an importance matrix that llama-quantize reads.

    Args:
        path: the GGUF file; it appears when it is complete.
        sums: name (see `stacks`) -> sums of the squared inputs, [columns]; all matrices of a stack, in order.
        counts: name -> number of inputs in the sums.
        datasets: sources of the text.
        chunk_size: tokens in a window.
        chunks: number of windows.
        overwrite: whether to replace an existing file.

    Raises:
        TritGgufError: the file exists or cannot be written.

    """
    from gguf import GGUFWriter

    path = check_output(path, overwrite)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with disk_errors(path):
            writer = GGUFWriter(part, arch="imatrix")
            writer.kv_data[0].clear()  # an importance matrix has no architecture
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", list(datasets))
            writer.add_uint32("imatrix.chunk_count", chunks)
            writer.add_uint32("imatrix.chunk_size", chunk_size)
            for tensor, names in by_tensor(sums).items():
                writer.add_tensor(tensor + _SUMS, np.array([sums[name] for name in names], np.float32))
                writer.add_tensor(tensor + _COUNTS, np.array([[counts[name]] for name in names], np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
            sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)

"""A GGUF file, memory-mapped and checked.

We parse the header ourselves instead of using gguf-py's reader, for two reasons. First, a file is untrusted: every
count, length, offset, type and shape is checked before use, and a bad one gives a one-line error. Second, gguf-py's
reader builds an array per string, which takes 1.7 s for SmolLM2's vocabulary and 6.8 s for Qwen2.5's, too long for
`run`, whose first token is due within one second. Here, values are decoded on access. Type tables and dequantization
are gguf-py's.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.errors import BadRequestError, DamagedFileError, TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.file_kinds import HEAD_BYTES, conversion_command, foreign_kind, is_hub_id, is_safetensors
from tritgguf.formats.gguf_header import ARRAY, F16, F32, MAGIC, HeaderParser, Metadata, TensorInfo
from tritgguf.formats.stacks import split_matrix_name

if TYPE_CHECKING:
    from gguf import GGUFValue

    from cpu_kernels.threads.thread_pool import ThreadPool
_WEIGHTS_AT_ONCE = 1 << 22  # gguf-py's dequantization takes several times this in temporary arrays


def open_trit_file(path: str | Path) -> GgufFile:
    """Open a file that `convert` wrote; raises as `GgufFile`, and BadRequestError for a stock GGUF file."""
    file = GgufFile(path)
    if trit_types.KEY_VERSION not in file.metadata:
        raise BadRequestError(f"{path}: is a stock GGUF file; pack it into trits first: {conversion_command(path)}")
    return file


class GgufFile:
    """A GGUF file, memory-mapped read-only; opening it checks every entry of its header.

    Raises TritGgufError, which names the file and the fault.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map = self._open()
        try:
            header = HeaderParser(self._map, self.path)
            self.tensors: dict[str, TensorInfo] = header.tensors
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise DamagedFileError(
                f"{self.path}: the header is damaged ({error}); fetch or write the file again"
            ) from error
        self._entries = header.entries
        self.metadata: Mapping[str, Any] = Metadata(self._map, header.entries)
        self._check_version()

    def _open(self) -> mmap.mmap:
        try:
            if self.path.is_fifo():  # opening it would wait for a writer
                raise TritGgufError(f"{self.path}: is a pipe, not a file; save it to a file first")
            with self.path.open("rb") as file:
                head = file.read(HEAD_BYTES)
                if os.fstat(file.fileno()).st_size < 24 or not head.startswith(MAGIC):
                    raise DamagedFileError(f"{self.path}: not a GGUF file{_kind(head)}")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise TritGgufError(f"{self.path}: {_why_unreadable(self.path, error)}") from error

    def _check_version(self) -> None:
        version = self.metadata.get(trit_types.KEY_VERSION)
        packed = any(trit_types.is_trit_type(info.type_id) for info in self.tensors.values())
        if packed and version != trit_types.FORMAT_VERSION:
            raise DamagedFileError(
                f"{self.path}: version {version} of the trit format is not known (version"
                f" {trit_types.FORMAT_VERSION} is); use a newer tritgguf or convert the model again"
            )

    def value(self, key: str) -> GGUFValue:
        """Return a metadata value with its GGUF types, as gguf-py's writer takes it."""
        from gguf import GGUFValue, GGUFValueType

        type_id, offset = self._entries[key]
        sub_type = struct.unpack_from("<I", self._map, offset)[0] if type_id == ARRAY else None
        return GGUFValue(
            value=self.metadata[key],
            type=GGUFValueType(type_id),
            sub_type=None if sub_type is None else GGUFValueType(sub_type),
        )

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor's bytes: uint8 [n_bytes], a read-only view of the map."""
        info = self.tensors[name]
        return np.frombuffer(self._map, dtype=np.uint8, count=info.n_bytes, offset=info.offset)

    def release(self, name: str, matrix: int | None = None) -> None:
        """Drop the resident pages of a tensor or of one of its matrices, so that reading a file does not fill memory.

        They are read from the file again on the next access. Does nothing if the system lacks MADV_DONTNEED.
        """
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        info = self.tensors[name]
        n_bytes = info.n_bytes if matrix is None else info.n_bytes // info.n_matrices
        begin = info.offset + (matrix or 0) * n_bytes
        start = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = begin + n_bytes - start
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def codebook(self, name: str) -> np.ndarray:
        """Return the scales of a trit tensor that is one matrix: float32 [27], checked as by `codebooks`."""
        codebooks = self.codebooks(name)
        if len(codebooks) != 1:
            raise ValueError(f"tensor {name} is a stack of {len(codebooks)} matrices")
        return codebooks[0]

    def codebooks(self, name: str) -> np.ndarray:
        """Return the scales of every matrix of a trit tensor: float32 [matrices, 27], read-only, checked."""
        return np.broadcast_to(self.stored_codebooks(name), (self.tensors[name].n_matrices, trit_types.CODEBOOK_SIZE))

    def stored_codebooks(self, name: str) -> np.ndarray:
        """Return a trit tensor's codebooks as the file has them, one for each matrix or one for all: float32 [n, 27].

        Scales are finite and not negative (checked).
        """
        key, count = trit_types.codebook_key(name), self.tensors[name].n_matrices
        values = self.metadata.get(key)
        if not isinstance(values, list) or len(values) not in (
            trit_types.CODEBOOK_SIZE,
            trit_types.CODEBOOK_SIZE * count,
        ):
            each = f" for each of its {count} matrices" if count > 1 else ""
            raise DamagedFileError(
                f"{self.path}: tensor {name} has no codebook of 27 entries{each} ({key}); convert the model again"
            )
        has_numbers = all(type(value) in (int, float) for value in values)
        with np.errstate(over="ignore"):
            codebooks = np.array(values if has_numbers else np.nan, dtype=np.float32)
        if not has_numbers or not np.isfinite(codebooks).all() or (codebooks < 0).any():
            raise DamagedFileError(
                f"{self.path}: tensor {name} has a codebook that is not a list of scales; convert the model again"
            )
        return codebooks.reshape(-1, trit_types.CODEBOOK_SIZE)

    def decode_rows(
        self, name: str, rows: np.ndarray, thread_pool: ThreadPool | None = None, *, first: int = 0
    ) -> np.ndarray:
        """Decode rows, uint8 [rows, bytes of a row], of a trit, F32 or F16 tensor to float32 [rows, columns].

        F32 is returned as a view. `thread_pool` decodes trits; None uses all cores. `first` is the number of the first
        row in the tensor, which counts through all matrices of a stack.
        """
        info = self.tensors[name]
        if trit_types.is_trit_type(info.type_id):
            return self._decode_trits(info, rows, first, thread_pool)
        if info.type_id == F32:
            return rows.view(np.float32)
        if info.type_id == F16:
            return rows.view(np.float16).astype(np.float32)
        raise ValueError(f"{info.type_name} cannot be decoded row by row")

    def _decode_trits(
        self, info: TensorInfo, rows: np.ndarray, first: int, thread_pool: ThreadPool | None
    ) -> np.ndarray:
        """Decode packed rows matrix by matrix, because each has its own codebook."""
        from cpu_kernels.packed_rows.unpack import dequantize

        depth, codebooks = trit_types.TritType(info.type_id).depth, self.codebooks(info.name)
        height = info.matrix_shape[0]
        last = first + len(rows)
        parts = []
        for index in range(first // height, -(-last // height)):
            begin, end = max(first, index * height), min(last, (index + 1) * height)
            parts.append(dequantize(rows[begin - first : end - first], codebooks[index], depth, thread_pool))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def stock_metadata(self) -> dict[str, GGUFValue]:
        """Return the keys that a conversion keeps: all except trit keys, the alignment and empty arrays.

        The writer chooses its own alignment. gguf-py's writer cannot write empty arrays.
        """
        return {
            key: self.value(key)
            for key, value in self.metadata.items()
            if not key.startswith("trit.") and key != "general.alignment" and value != []
        }

    def read_float32(self, name: str) -> np.ndarray:
        """Return a tensor dequantized: float32, `shape` of its TensorInfo.

        Raises TritGgufError for a type that gguf-py does not dequantize.
        """
        info = self.tensors[name]
        return self.read_rows(name, 0, info.rows).reshape(info.shape)

    def read_matrix(self, matrix: str) -> np.ndarray:
        """Return a matrix, by its name (see `stacks`), dequantized as by `read_float32`: float32 [rows, columns]."""
        name, index = split_matrix_name(matrix)
        rows = self.tensors[name].matrix_shape[0]
        return self.read_rows(name, (index or 0) * rows, ((index or 0) + 1) * rows)

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Return rows `first` to `last` (exclusive), dequantized as by `read_float32`: float32 [rows, row length].

        Rows count through all matrices of a stack.
        """
        info = self.tensors[name]
        rows = self.raw(name).reshape(info.rows, -1)[first:last]
        if trit_types.is_trit_type(info.type_id) or info.type_id in (F32, F16):
            return self.decode_rows(name, rows, first=first)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize as dequantize_stock

        weights = np.empty((len(rows), info.shape[-1]), np.float32)
        step = max(1, _WEIGHTS_AT_ONCE // info.shape[-1])
        try:
            for start in range(0, len(rows), step):
                weights[start : start + step] = dequantize_stock(
                    rows[start : start + step], GGMLQuantizationType(info.type_id)
                )
        except NotImplementedError as error:
            raise DamagedFileError(
                f"{self.path}: tensor {name} has type {info.type_name}, which cannot be read; use an F16 or Q8_0 file"
            ) from error
        return weights


def _kind(head: bytes) -> str:
    """Return what a file is that is no GGUF file, if its first bytes tell."""
    if is_safetensors(head):
        return "; it is a safetensors file: give the folder that contains it and config.json"
    kind = None if head.startswith(MAGIC) else foreign_kind(head)
    return f"; it {kind}" if kind else ""


def _why_unreadable(path: Path, error: OSError) -> str:
    """Return why there is no GGUF file at a path, and how to make one of what is there."""
    if path.is_dir():
        is_model = (path / "config.json").exists()
        return f"is a folder, not a GGUF file{f'; make one first: {conversion_command(path)}' if is_model else ''}"
    if isinstance(error, FileNotFoundError) and is_hub_id(str(path)):
        return f"no such file; if it is a model on the hub, make a GGUF file first: {conversion_command(path)}"
    return f"cannot be read ({error.strerror})"

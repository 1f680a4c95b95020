"""Streaming GGUF writer: tensors one by one, then the header once more with the values known only at the end.

A failure leaves only files from which the conversion can resume.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

import numpy as np
import xxhash
from gguf import GGMLQuantizationType, GGUFValue, GGUFWriter
from gguf.gguf_writer import WriterState

from tritgguf.errors import DamagedFileError, TritGgufError
from tritgguf.formats.durable_output import DiskError, check_output, check_room, disk_errors, open_locked, sync_folder
from tritgguf.formats.journal import Journal, WrittenMatrix
from tritgguf.formats.metadata_bytes import encoded_metadata
from tritgguf.formats.stacks import matrix_count, matrix_names

ALIGNMENT = 32
"""Every tensor begins at a multiple of this many bytes."""
_SYNC_BYTES = 1 << 26
_SYNC_SECONDS = 0.5
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: `shape` in NumPy order, `type_id` a ggml type, `n_bytes` its size in the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    n_bytes: int

    @property
    def matrices(self) -> list[str]:
        """Names of its matrices, see `stacks`."""
        return matrix_names(self.name, self.shape)

    @property
    def matrix_bytes(self) -> int:
        """Size of each of its matrices."""
        return self.n_bytes // matrix_count(self.shape)


class StreamingWriter:
    """Context manager that writes the header, the tensors in the planned order, then the header once more.

    A tensor is written as `begin`, then `write` and `end` for each of its matrices.

    The file grows as `OUTPUT.part`. It is synced and renamed when every tensor is complete. Without a journal, any
    error removes it. With a journal, an interruption or a full disk keeps both files, and with `resume` the writer
    continues after the matrices in `resumed`. Raises TritGgufError if the output exists, if another process is writing
    it, if its folder is not writable and if the disk is full.
    """

    def __init__(
        self,
        output: str | Path,
        metadata: Mapping[str, GGUFValue],
        tensors: Sequence[PlannedTensor],
        *,
        overwrite: bool = False,
        journal: Journal | None = None,
        resume: bool = False,
    ) -> None:
        self.tensors = list(tensors)
        self.resumed: list[WrittenMatrix] = []
        self._remaining = 0  # bytes of the current tensor
        self._matrices: list[str] = []  # the current tensor's that are not complete
        self._hash = xxhash.xxh3_64()
        self._journal, self._resume = journal, resume
        self._unsynced, self._synced_at = 0, time.monotonic()
        self._unsynced_matrices: list[WrittenMatrix] = []
        self.output = check_output(output, overwrite)
        self._part = self.output.with_name(f"{self.output.name}.part")
        self._writer = _header_writer(metadata, self.tensors)
        self._file: BinaryIO | None = None
        self._header_bytes = 0
        self._next = 0

    def __enter__(self) -> StreamingWriter:
        """Write the header with the current metadata, and find the tensors that exist already."""
        try:
            with disk_errors(self.output):
                self._file = open_locked(
                    self._part, f"{self.output}: another conversion is writing it; wait for it, or name another file"
                )
                header = self._header()
                self._header_bytes = len(header)
                self._begin(header)
        except BaseException:
            self._close(keep=self._resume)
            raise
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish the file; after an error, remove it or keep it for resuming."""
        try:
            if error is None:
                with disk_errors(self.output):
                    self._finish()
            elif self._journal is not None and (self.resumed or _is_interruption(error)):
                with suppress(TritGgufError, OSError):
                    self._sync()
                self._close(keep=True)
        except BaseException as failure:
            self._close(keep=self._journal is not None and _is_interruption(failure))
            raise
        finally:
            self._close()

    def begin(self, tensor: PlannedTensor) -> None:
        """Start the next planned tensor; `write` then takes its bytes."""
        if self._remaining or self.tensors[self._next : self._next + 1] != [tensor]:
            raise ValueError(f"tensor {tensor.name} is not the next one of the plan")
        self._next += 1
        self._remaining, self._matrices = tensor.n_bytes, tensor.matrices
        self._hash.reset()

    def write(self, data: np.ndarray) -> None:
        """Write the bytes of an array, which is a part or all of the current matrix."""
        if data.nbytes > self._remaining or self._file is None:
            raise ValueError("more bytes than the plan has for this tensor")
        with disk_errors(self.output):
            content = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
            self._file.write(content)
            self._hash.update(content)
            self._remaining -= data.nbytes
            self._unsynced += data.nbytes
            if self._remaining == 0:
                self._pad()

    def end(self, codebook: np.ndarray | None = None, squares: tuple[float, float] = (0.0, 0.0)) -> int:
        """Complete the current matrix and return the checksum of the tensor's bytes so far.

        Syncs the file if the last sync was long ago or many bytes ago. `codebook` and `squares` (squared error, squared
        weights) go into the journal, see `WrittenMatrix`.
        """
        assert self._file is not None
        tensor = self.tensors[self._next - 1]
        if not self._matrices or self._remaining != (len(self._matrices) - 1) * tensor.matrix_bytes:
            raise ValueError("another number of bytes than the plan has for this matrix")
        checksum = self._hash.intdigest()
        entries = None if codebook is None else [float(entry) for entry in codebook]
        written = WrittenMatrix(self._matrices.pop(0), self._file.tell(), checksum, entries, *squares)
        self._unsynced_matrices.append(written)
        if self._unsynced >= _SYNC_BYTES or time.monotonic() > self._synced_at + _SYNC_SECONDS:
            with disk_errors(self.output):
                self._sync()
        return checksum

    def read_back(self, index: int, n_bytes: int) -> np.ndarray:
        """Return the bytes of a matrix that an earlier run wrote, by its index in `resumed`: uint8 [n_bytes]."""
        with disk_errors(self.output), self._part.open("rb") as file:
            file.seek(self._start_of(index))
            return np.frombuffer(file.read(n_bytes), np.uint8)

    def _start_of(self, index: int) -> int:
        """Return the file offset of what follows so many matrices of an earlier run."""
        return self.resumed[index - 1].end if index else self._header_end

    def set_metadata(self, key: str, value: GGUFValue) -> None:
        """Replace a metadata value of the header; the new value must have the same encoded size."""
        if key not in self._writer.kv_data[0]:
            raise ValueError(f"the header has no key {key}")
        self._writer.kv_data[0][key] = value

    @property
    def _header_end(self) -> int:
        return _aligned(self._header_bytes)

    def _begin(self, header: bytes) -> None:
        """Write the header, and seek to the end of the tensors that an unfinished file has."""
        assert self._file is not None
        if self._journal is not None and self._resume:
            self.resumed = self._journal.read()
        names = [name for tensor in self.tensors for name in tensor.matrices][: len(self.resumed)]
        end = self._start_of(len(self.resumed))
        if self.resumed and ([t.name for t in self.resumed] != names or self._file.seek(0, os.SEEK_END) < end):
            raise self._misfit()
        self._continue_tensor()
        if not self.resumed:
            self._file.truncate(0)
        check_room(self.output, self._remaining + sum(tensor.n_bytes for tensor in self.tensors[self._next :]))
        self._file.seek(0)
        self._file.write(header)
        self._pad()
        self._file.seek(end)
        self._file.truncate(end)
        if self._journal is not None and not self.resumed:
            self._journal.begin()

    def _continue_tensor(self) -> None:
        """Find the next tensor after the matrices that exist, or the current one if only some of its matrices do.

        Raises DamagedFileError if they are not as they were when they were written.
        """
        index = 0
        while self._next < len(self.tensors) and index < len(self.resumed):
            tensor = self.tensors[self._next]
            self._next += 1
            end = min(index + len(tensor.matrices), len(self.resumed))
            self._matrices = tensor.matrices[end - index :]
            self._remaining = len(self._matrices) * tensor.matrix_bytes
            self._hash.reset()
            for place in range(index, end):
                self._hash_again(place, tensor.matrix_bytes)
                if self._hash.intdigest() != self.resumed[place].checksum:
                    raise self._misfit()
            index = end

    def _hash_again(self, index: int, n_bytes: int) -> None:
        """Hash a matrix that an earlier run wrote, in pieces, as it was hashed then."""
        with disk_errors(self.output), self._part.open("rb") as file:
            file.seek(self._start_of(index))
            for start in range(0, n_bytes, _READ_BYTES):
                self._hash.update(file.read(min(_READ_BYTES, n_bytes - start)))

    def _misfit(self) -> DamagedFileError:
        return DamagedFileError(f"{self._part}: does not match its journal; start over without --resume")

    def _header(self) -> bytes:
        """Return the encoded header with the current metadata."""
        return _encode(self._writer)

    def _sync(self) -> None:
        """Sync the file, then record its new matrices in the journal."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._journal is not None and self._unsynced_matrices:
            self._journal.add(self._unsynced_matrices)
        self._unsynced, self._synced_at, self._unsynced_matrices = 0, time.monotonic(), []

    def _finish(self) -> None:
        assert self._file is not None
        if self._remaining or self._next != len(self.tensors):
            raise ValueError("a planned tensor was not written")
        header = self._header()
        if len(header) != self._header_bytes:
            raise ValueError("the header changed its length")
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._part, self.output)
        sync_folder(self.output.parent)
        if self._journal is not None:
            self._journal.remove()
        self._file.close()
        self._file = None

    def _close(self, *, keep: bool = False) -> None:
        """Close the unfinished file if it is open; remove it and its journal unless `keep`."""
        if self._file is None:
            return
        if not keep:
            self._part.unlink(missing_ok=True)
            if self._journal is not None:
                self._journal.remove()
        # After a failed write the data is still buffered, and closing fails again.
        with suppress(OSError):
            self._file.close()
        self._file = None

    def _pad(self) -> None:
        assert self._file is not None
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))


def planned_file_bytes(metadata: Mapping[str, GGUFValue], tensors: Sequence[PlannedTensor]) -> int:
    """Return the size of the file that `StreamingWriter` writes."""
    header = _encode(_header_writer(metadata, tensors))
    return _aligned(len(header)) + sum(_aligned(tensor.n_bytes) for tensor in tensors)


def _header_writer(metadata: Mapping[str, GGUFValue], tensors: Sequence[PlannedTensor]) -> GGUFWriter:
    """Return gguf-py's writer, which encodes the header."""
    writer = GGUFWriter(None, str(metadata["general.architecture"].value))
    writer.kv_data[0] = dict(metadata)
    for tensor in tensors:
        kind = cast("GGMLQuantizationType", tensor.type_id)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=kind)
    return writer


def encode_entries(metadata: Mapping[str, GGUFValue]) -> bytes:
    """Return keys and values as a header has them."""
    writer, buffer = GGUFWriter(None, ""), io.BytesIO()
    writer.kv_data[0] = dict(metadata)
    writer.fout = [buffer]  # type: ignore[list-item]
    writer.state = WriterState.HEADER
    writer.write_kv_data_to_file()
    return buffer.getvalue()


def _encode(writer: GGUFWriter) -> bytes:
    """Return the encoded header with the writer's current metadata."""
    buffer = io.BytesIO()
    writer.fout = [buffer]  # type: ignore[list-item]
    writer.state = WriterState.EMPTY
    writer.write_header_to_file()
    buffer.write(encoded_metadata(writer.kv_data[0]))
    writer.state = WriterState.KV_DATA
    writer.write_ti_data_to_file()
    return buffer.getvalue()


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _is_interruption(error: BaseException) -> bool:
    """Tell whether an error allows resuming: Ctrl-C, exit or a disk error."""
    return isinstance(error, (KeyboardInterrupt, SystemExit, DiskError))

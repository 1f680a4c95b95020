"""Writing a GGUF tensor by tensor, with metadata that is known only at the end, and nothing left behind on failure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

import numpy as np
from gguf import GGMLQuantizationType, GGUFValue, GGUFWriter
from gguf.gguf_writer import WriterState

from tritgguf.disk import check_room, disk_errors, sync_folder
from tritgguf.errors import TritGgufError

_ALIGNMENT = 32
_SYNC_BYTES = 1 << 26


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file to be written: `shape` in NumPy order, `type_id` a ggml type, size in the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    n_bytes: int


class StreamingWriter:
    """Writes the header, then tensor after tensor in the planned order, then the header once more.

    A context manager. The file grows under a temporary name in the output's folder; it is synced and renamed only
    when every tensor is complete, and removed if anything goes wrong. Raises TritGgufError for an existing output, a
    folder that cannot be written to and a full disk.
    """

    def __init__(
        self,
        output: str | Path,
        metadata: Mapping[str, GGUFValue],
        tensors: Sequence[PlannedTensor],
        *,
        overwrite: bool = False,
    ) -> None:
        self.output = Path(output)
        self.tensors = list(tensors)
        self._remaining = 0
        self._unsynced = 0
        check_output(self.output, overwrite)
        check_room(self.output, sum(tensor.n_bytes for tensor in self.tensors))
        self._temporary = self.output.with_name(f".{self.output.name}.{os.getpid()}.partial")
        self._writer = GGUFWriter(self._temporary, str(metadata["general.architecture"].value))
        self._writer.kv_data[0] = dict(metadata)
        for tensor in self.tensors:
            self._writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),
                tensor.n_bytes,
                raw_dtype=cast("GGMLQuantizationType", tensor.type_id),
            )
        self._file: BinaryIO | None = None
        self._header_end = 0
        self._next = 0

    def __enter__(self) -> StreamingWriter:
        """Write the header, with the metadata as it is now."""
        try:
            with disk_errors(self.output):
                self._header_end = self._write_header()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish the file, or remove it after an error."""
        try:
            if kind is None:
                with disk_errors(self.output):
                    self._finish()
        finally:
            self._discard()

    def begin(self, tensor: PlannedTensor) -> None:
        """Start the next planned tensor; its bytes follow through `write`."""
        if self._remaining or self.tensors[self._next : self._next + 1] != [tensor]:
            raise ValueError(f"tensor {tensor.name} is not the next one of the plan")
        self._next += 1
        self._remaining = tensor.n_bytes

    def write(self, data: np.ndarray) -> None:
        """Write (a part of) the tensor that `begin` started: any contiguous array, as its bytes."""
        if data.nbytes > self._remaining or self._file is None:
            raise ValueError("more bytes than the plan has for this tensor")
        with disk_errors(self.output):
            self._file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
            self._remaining -= data.nbytes
            self._unsynced += data.nbytes
            if self._remaining == 0:
                self._pad()

    def sync(self) -> None:
        """Put on the disk what has been written since the last time, if it is much: less is left for the end."""
        assert self._file is not None
        if self._unsynced >= _SYNC_BYTES:
            with disk_errors(self.output):
                self._file.flush()
                os.fsync(self._file.fileno())
            self._unsynced = 0

    def set_metadata(self, key: str, value: GGUFValue) -> None:
        """Change a value that the header already has; it must take the same number of bytes."""
        if key not in self._writer.kv_data[0]:
            raise ValueError(f"the header has no key {key}")
        self._writer.kv_data[0][key] = value

    def _write_header(self) -> int:
        """Write the header from the file's start; return where it ends, before the first tensor's alignment."""
        self._writer.write_header_to_file()
        assert self._writer.fout is not None
        self._file = cast("BinaryIO", self._writer.fout[0])
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        end = self._file.tell()
        self._pad()
        return end

    def _finish(self) -> None:
        assert self._file is not None
        if self._remaining or self._next != len(self.tensors):
            raise ValueError("a planned tensor was not written")
        self._file.seek(0)
        self._writer.state = WriterState.EMPTY
        if self._write_header() != self._header_end:
            raise ValueError("the header changed its length")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.output)
        sync_folder(self.output.parent)

    def _discard(self) -> None:
        """Close and remove the temporary file, if it is still there."""
        for file in self._writer.fout or ():
            # What the disk refused to take is still buffered, and refused again here.
            with suppress(OSError):
                file.close()
        self._temporary.unlink(missing_ok=True)

    def _pad(self) -> None:
        assert self._file is not None
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))


def check_output(output: Path, overwrite: bool) -> None:
    """Raise TritGgufError unless a file may be written at `output`."""
    if output.is_dir():
        raise TritGgufError(f"{output}: is a folder; name a file")
    if output.exists() and not overwrite:
        raise TritGgufError(f"{output}: exists already; name another file or use --overwrite")
    if not output.parent.is_dir():
        raise TritGgufError(f"{output}: its folder does not exist; create it first")

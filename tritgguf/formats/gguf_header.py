"""Parsing and checking of a GGUF header."""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tritgguf.errors import DamagedFileError
from tritgguf.formats import trit_types
from tritgguf.formats.stacks import matrix_count, matrix_shape

F32, F16, BF16 = 0, 1, 30
MAGIC = b"GGUF"
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_SCALAR_BYTES = {type_id: struct.calcsize(code) for type_id, code in _SCALARS.items()}
STRING, ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_COUNT = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry: `shape` in NumPy order (rows first, row length last), `offset` from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    n_bytes: int

    @property
    def type_name(self) -> str:
        """The ggml type's name, such as `F16` or `TRIT2`."""
        if trit_types.is_trit_type(self.type_id):
            return trit_types.TritType(self.type_id).name
        stock = stock_type(self.type_id)
        return stock[0] if stock else f"type {self.type_id}"

    @property
    def n_weights(self) -> int:
        """Number of elements."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def n_matrices(self) -> int:
        """Number of matrices in a stack; 1 for a matrix or a vector."""
        return matrix_count(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of each matrix; a vector is a single row."""
        return matrix_shape(self.shape)

    @property
    def rows(self) -> int:
        """Number of rows in all matrices."""
        return self.n_matrices * self.matrix_shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.n_bytes // self.rows


class Metadata(Mapping[str, Any]):
    """Key-value pairs, decoded on access."""

    def __init__(self, buffer: mmap.mmap, entries: dict[str, tuple[int, int]]) -> None:
        self._buffer = buffer
        self._entries = entries

    def __getitem__(self, key: str) -> Any:
        type_id, position = self._entries[key]
        return decode_value(self._buffer, type_id, position)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class HeaderParser:
    """Parses and checks all keys and tensor entries of a header in one pass.

    Attributes:
        entries: key -> the value's type and offset, in the file's order.
        tensors: the tensors by name.
        keys_end, header_end, data_start: offsets of the first tensor's entry, of the end of the last one and of the
            tensors' data.
        alignment: every tensor begins at a multiple of this many bytes.

    """

    def __init__(self, buffer: mmap.mmap | bytes, path: Path) -> None:
        self.buffer = buffer
        self.path = path
        self.size = len(buffer)
        self.position = 4
        self.entries: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        version, tensor_count, key_count = self._take("<IQQ")
        if version in (2 << 24, 3 << 24):
            raise DamagedFileError(
                f"{path}: is big-endian, which this program does not read; convert it (gguf-convert-endian FILE little,"
                " which comes with the package gguf) or fetch the little-endian file"
            )
        if version not in (2, 3):
            self._fail(f"GGUF version {version} is not supported (2 and 3 are)")
        if tensor_count > _MAX_COUNT or key_count > _MAX_COUNT:
            self._fail("the header claims more entries than any model has; the file is damaged")
        for _ in range(key_count):
            key = self._take_string()
            if key in self.entries:
                self._fail(f"the key {key} occurs twice")
            type_id = self._take("<I")[0]
            self.entries[key] = (type_id, self.position)
            self._skip_value(type_id)
        self.keys_end = self.position
        self.alignment = self._alignment()
        infos = [self._take_tensor() for _ in range(tensor_count)]
        self.header_end = self.position
        self.data_start = -(-self.position // self.alignment) * self.alignment
        for name, shape, type_id, offset in infos:
            if offset % self.alignment:
                self._fail(f"tensor {name} does not start at a multiple of {self.alignment} bytes")
            self.tensors[name] = self._check_tensor(name, shape, type_id, self.data_start + offset)
        if len(self.tensors) != len(infos):
            self._fail("two tensors have the same name")
        self._check_overlap()

    def _fail(self, what: str) -> NoReturn:
        raise DamagedFileError(f"{self.path}: {what}; fetch or write the file again")

    def _fail_at_end(self) -> NoReturn:
        self._fail("the file ends inside its header")

    def _take(self, code: str) -> tuple[Any, ...]:
        size = struct.calcsize(code)
        if self.position + size > self.size:
            self._fail_at_end()
        values = struct.unpack_from(code, self.buffer, self.position)
        self.position += size
        return values

    def _skip(self, length: int) -> None:
        if length > self.size - self.position:
            self._fail_at_end()
        self.position += length

    def _take_string(self) -> str:
        length = self._take("<Q")[0]
        start = self.position
        self._skip(length)
        return self.buffer[start : self.position].decode("utf-8")

    def _skip_value(self, type_id: int, nesting: int = 0) -> None:
        if type_id in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[type_id])
        elif type_id == STRING:
            self._skip(self._take("<Q")[0])
        elif type_id == ARRAY and nesting < 2:
            element_type, count = self._take("<IQ")
            if element_type in _SCALAR_BYTES:
                self._skip(count * _SCALAR_BYTES[element_type])
            elif element_type == STRING:
                self._skip_strings(count)
            elif element_type != ARRAY:
                self._fail(f"a metadata value has the unknown type {element_type}")
            else:
                for _ in range(count):
                    self._skip_value(element_type, nesting + 1)
        else:
            self._fail(f"a metadata value has the unknown type {type_id}")

    def _skip_strings(self, count: int) -> None:
        """Skip an array of strings; this is the header's hot loop, because vocabularies are long."""
        if count > (self.size - self.position) // 8:
            self._fail_at_end()
        position, end, buffer = self.position, self.size - 8, self.buffer
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position > end:
                self._fail_at_end()
            position += 8 + unpack(buffer, position)[0]
        self.position = position
        self._skip(0)

    def _alignment(self) -> int:
        if "general.alignment" not in self.entries:
            return 32
        type_id, position = self.entries["general.alignment"]
        value = decode_value(self.buffer, type_id, position)[0] if type_id in _SCALARS else 0
        if not isinstance(value, int) or not 8 <= value <= 1 << 20 or value & (value - 1):
            self._fail("general.alignment is not a power of two from 8 to 1048576")
        return value

    def _take_tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._take_string()
        n_dimensions = self._take("<I")[0]
        if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
            self._fail(f"tensor {name} has {n_dimensions} dimensions")
        lengths = self._take(f"<{n_dimensions}Q")
        type_id, offset = self._take("<IQ")
        return name, tuple(reversed(lengths)), type_id, offset

    def _check_tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> TensorInfo:
        if trit_types.is_trit_type(type_id):
            block_size = trit_types.BLOCK_SIZE
            block_bytes = trit_types.block_bytes(trit_types.TritType(type_id).depth)
        else:
            stock = stock_type(type_id)
            if stock is None:
                self._fail(f"tensor {name} has the unknown type {type_id}")
            _, block_size, block_bytes = stock
        n_weights = 1
        for length in shape:
            n_weights *= length
        if n_weights == 0 or shape[-1] % block_size:
            self._fail(f"tensor {name} has a shape {shape} that its type does not allow")
        n_bytes = n_weights // block_size * block_bytes
        if offset + n_bytes > self.size:
            self._fail(f"tensor {name} reaches beyond the end of the file; the file is truncated")
        return TensorInfo(name, shape, type_id, offset, n_bytes)

    def _check_overlap(self) -> None:
        end, previous = 0, ""
        for info in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            if info.offset < end:
                self._fail(f"tensors {previous} and {info.name} overlap")
            end, previous = info.offset + info.n_bytes, info.name


def decode_value(buffer: mmap.mmap | bytes, type_id: int, position: int) -> tuple[Any, int]:
    """Decode a value that HeaderParser has checked; return it and the offset of the byte after it."""
    if type_id in _SCALARS:
        return struct.unpack_from(_SCALARS[type_id], buffer, position)[0], position + _SCALAR_BYTES[type_id]
    if type_id == STRING:
        texts, end = _decode_strings(buffer, 1, position)
        return texts[0], end
    element_type, count = struct.unpack_from("<IQ", buffer, position)
    position += 12
    if element_type in _SCALARS:
        end = position + count * _SCALAR_BYTES[element_type]
        code = _SCALARS[element_type].replace("?", "?1")
        return np.frombuffer(buffer[position:end], dtype=np.dtype(code.removesuffix("1"))).tolist(), end
    if element_type == STRING:
        return _decode_strings(buffer, count, position)
    values = []
    for _ in range(count):
        value, position = decode_value(buffer, element_type, position)
        values.append(value)
    return values, position


def _decode_strings(buffer: mmap.mmap | bytes, count: int, position: int) -> tuple[list[str], int]:
    """Decode strings that follow one another; a hot loop, because vocabularies are long."""
    unpack, texts = struct.Struct("<Q").unpack_from, []
    for _ in range(count):
        start = position + 8
        position = start + unpack(buffer, position)[0]
        texts.append(buffer[start:position].decode("utf-8", errors="replace"))
    return texts, position


class _HeadParser(HeaderParser):
    """Parses the first bytes of a file."""

    def _fail_at_end(self) -> NoReturn:
        raise _IncompleteHeadError


class _IncompleteHeadError(Exception):
    """The bytes end inside the header."""


def head_has_key(head: bytes, key: str) -> bool | None:
    """Tell whether a GGUF file that begins with `head` has a metadata key; None if that needs more bytes.

    What is no GGUF file has no key.
    """
    name = key.encode()
    if head[: len(MAGIC)] != MAGIC[: len(head)]:
        return False
    if len(name).to_bytes(8, "little") + name in head:
        return True
    try:
        _HeadParser(head, Path())
    except _IncompleteHeadError:
        return None
    except (DamagedFileError, UnicodeDecodeError, OverflowError):
        return False  # the keys are complete, because tensors come after them, or they are damaged
    return False


_COMMON_TYPES = {F32: ("F32", 1, 4), F16: ("F16", 1, 2)}  # the common case needs no import of gguf


@functools.cache
def stock_type(type_id: int) -> tuple[str, int, int] | None:
    """Return name, weights per block and bytes per block of an upstream ggml type; None for an unknown id."""
    if type_id in _COMMON_TYPES:
        return _COMMON_TYPES[type_id]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    member = GGMLQuantizationType._value2member_map_.get(type_id)
    if not isinstance(member, GGMLQuantizationType) or member not in GGML_QUANT_SIZES:
        return None
    return (member.name, *GGML_QUANT_SIZES[member])

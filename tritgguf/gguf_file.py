"""A GGUF file, memory-mapped and checked, and a writer that streams one.

The header is parsed here and not by gguf-py's reader for two reasons. A file is untrusted: every count, length,
offset, type and shape is checked before anything uses it, and a bad one gives one clear line. And the reader of
gguf-py builds an array per string, which takes 1.7 s for SmolLM2's vocabulary and 6.8 s for Qwen2.5's, where `run`
has one second to the first token; here a value is decoded when somebody asks for it. Type tables, dequantization
and the writer's encoding are gguf-py's.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from tritgguf import trit_types
from tritgguf.errors import TritGgufError

if TYPE_CHECKING:
    from gguf import GGUFValue

    from cpu_kernels.crew import Crew

F32, F16, BF16 = 0, 1, 30
_MAGIC = b"GGUF"
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
_STRING, _ARRAY = 8, 9
_WEIGHTS_AT_ONCE = 1 << 22  # gguf-py's dequantization takes several times this in temporary arrays
_MAX_DIMENSIONS = 4
_MAX_COUNT = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` in NumPy order (rows first, row length last), `offset` from the file's start."""

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
        stock = _stock_type(self.type_id)
        return stock[0] if stock else f"type {self.type_id}"

    @property
    def n_weights(self) -> int:
        """Number of elements."""
        count = 1
        for length in self.shape:
            count *= length
        return count


class GgufFile:
    """A GGUF file, mapped read-only; every entry of its header is checked when it is opened.

    Raises TritGgufError, which names the file and what is wrong with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map = self._open()
        try:
            header = _HeaderParser(self._map, self.path)
            self.tensors: dict[str, TensorInfo] = header.tensors
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise TritGgufError(
                f"{self.path}: the header is damaged ({error}); fetch or write the file again"
            ) from error
        self._entries = header.entries
        self.metadata: Mapping[str, Any] = _Metadata(self._map, header.entries)
        self._check_version()

    def _open(self) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < 24 or file.read(4) != _MAGIC:
                    raise TritGgufError(f"{self.path}: not a GGUF file")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise TritGgufError(f"{self.path}: cannot be read ({error.strerror})") from error

    def _check_version(self) -> None:
        version = self.metadata.get(trit_types.KEY_VERSION)
        packed = any(trit_types.is_trit_type(info.type_id) for info in self.tensors.values())
        if packed and version != trit_types.FORMAT_VERSION:
            raise TritGgufError(
                f"{self.path}: version {version} of the trit format is not known (version"
                f" {trit_types.FORMAT_VERSION} is); use a newer tritgguf or convert the model again"
            )

    def value(self, key: str) -> GGUFValue:
        """Return a metadata value with its GGUF types, as gguf-py's writer takes it."""
        from gguf import GGUFValue, GGUFValueType

        type_id, position = self._entries[key]
        sub_type = struct.unpack_from("<I", self._map, position)[0] if type_id == _ARRAY else None
        return GGUFValue(
            value=self.metadata[key],
            type=GGUFValueType(type_id),
            sub_type=None if sub_type is None else GGUFValueType(sub_type),
        )

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor's bytes: uint8 [n_bytes], a read-only view of the map."""
        info = self.tensors[name]
        return np.frombuffer(self._map, dtype=np.uint8, count=info.n_bytes, offset=info.offset)

    def release(self, name: str) -> None:
        """Let go of a tensor's resident pages, so that reading a file once does not fill memory with it.

        They come back from the file when they are read again. Does nothing where the system has no such advice.
        """
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        info = self.tensors[name]
        start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = info.offset + info.n_bytes - start
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def codebook(self, name: str) -> np.ndarray:
        """Return a trit tensor's scales: float32 [27], finite and not negative (checked)."""
        key = trit_types.codebook_key(name)
        values = self.metadata.get(key)
        if not isinstance(values, list) or len(values) != trit_types.CODEBOOK_SIZE:
            raise TritGgufError(
                f"{self.path}: tensor {name} has no codebook of 27 entries ({key}); convert the model again"
            )
        is_numbers = all(type(value) in (int, float) for value in values)
        with np.errstate(over="ignore"):
            codebook = np.array(values if is_numbers else np.nan, dtype=np.float32)
        if not is_numbers or not np.isfinite(codebook).all() or (codebook < 0).any():
            raise TritGgufError(
                f"{self.path}: tensor {name} has a codebook that is no list of scales; convert the model again"
            )
        return codebook

    def decode_rows(self, name: str, rows: np.ndarray, crew: Crew | None = None) -> np.ndarray:
        """Return some rows, uint8 [rows, bytes of a row], of a tensor in trits, F32 or F16 as float32 [rows, columns].

        F32 is returned as a view. `crew` are the threads to use for trits; None for all cores.
        """
        info = self.tensors[name]
        if trit_types.is_trit_type(info.type_id):
            from cpu_kernels.unpack import dequantize

            return dequantize(rows, self.codebook(name), trit_types.TritType(info.type_id).depth, crew)
        if info.type_id == F32:
            return rows.view(np.float32)
        if info.type_id == F16:
            return rows.view(np.float16).astype(np.float32)
        raise ValueError(f"{info.type_name} is not decoded row by row")

    def stock_metadata(self) -> dict[str, GGUFValue]:
        """Return the keys that outlive a conversion: all but those of trits, the alignment and empty arrays.

        The alignment is the writer's own affair; empty arrays say nothing, and gguf-py's writer has none.
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
        return self.read_rows(name, 0, info.n_weights // info.shape[-1]).reshape(info.shape)

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Return the rows from `first` to before `last`, as `read_float32` does: float32 [rows, row length]."""
        info = self.tensors[name]
        rows = self.raw(name).reshape(info.n_weights // info.shape[-1], -1)[first:last]
        if trit_types.is_trit_type(info.type_id) or info.type_id in (F32, F16):
            return self.decode_rows(name, rows)
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
            raise TritGgufError(
                f"{self.path}: tensor {name} has type {info.type_name}, which cannot be read; use an F16 or Q8_0 file"
            ) from error
        return weights


class _Metadata(Mapping[str, Any]):
    """Key-value pairs, decoded when asked for."""

    def __init__(self, buffer: mmap.mmap, entries: dict[str, tuple[int, int]]) -> None:
        self._buffer = buffer
        self._entries = entries

    def __getitem__(self, key: str) -> Any:
        type_id, position = self._entries[key]
        return _decode(self._buffer, type_id, position)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _decode(buffer: mmap.mmap, type_id: int, position: int) -> tuple[Any, int]:
    """Decode a value that _HeaderParser has checked; return it and the position behind it."""
    if type_id in _SCALARS:
        return struct.unpack_from(_SCALARS[type_id], buffer, position)[0], position + _SCALAR_BYTES[type_id]
    if type_id == _STRING:
        length = struct.unpack_from("<Q", buffer, position)[0]
        text = buffer[position + 8 : position + 8 + length].decode("utf-8", errors="replace")
        return text, position + 8 + length
    element_type, count = struct.unpack_from("<IQ", buffer, position)
    position += 12
    if element_type in _SCALARS:
        end = position + count * _SCALAR_BYTES[element_type]
        code = _SCALARS[element_type].replace("?", "?1")
        return np.frombuffer(buffer[position:end], dtype=np.dtype(code.removesuffix("1"))).tolist(), end
    values = []
    for _ in range(count):
        value, position = _decode(buffer, element_type, position)
        values.append(value)
    return values, position


class _HeaderParser:
    """One pass over the header: finds every key and tensor and checks all of it."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer = buffer
        self.path = path
        self.size = len(buffer)
        self.position = 4
        self.entries: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        version, tensor_count, key_count = self.take("<IQQ")
        if version not in (2, 3):
            self.fail(f"GGUF version {version} is not supported (2 and 3 are)")
        if tensor_count > _MAX_COUNT or key_count > _MAX_COUNT:
            self.fail("the header counts more entries than any model has; the file is damaged")
        for _ in range(key_count):
            key = self.take_string()
            if key in self.entries:
                self.fail(f"the key {key} occurs twice")
            type_id = self.take("<I")[0]
            self.entries[key] = (type_id, self.position)
            self.skip_value(type_id)
        alignment = self.alignment()
        infos = [self.take_tensor() for _ in range(tensor_count)]
        data_start = -(-self.position // alignment) * alignment
        for name, shape, type_id, offset in infos:
            if offset % alignment:
                self.fail(f"tensor {name} does not start at a multiple of {alignment} bytes")
            self.tensors[name] = self.check_tensor(name, shape, type_id, data_start + offset)
        if len(self.tensors) != len(infos):
            self.fail("two tensors have the same name")
        self.check_overlap()

    def fail(self, what: str) -> NoReturn:
        raise TritGgufError(f"{self.path}: {what}; fetch or write the file again")

    def take(self, code: str) -> tuple[Any, ...]:
        size = struct.calcsize(code)
        if self.position + size > self.size:
            self.fail("the file ends inside its header")
        values = struct.unpack_from(code, self.buffer, self.position)
        self.position += size
        return values

    def skip(self, length: int) -> None:
        if length > self.size - self.position:
            self.fail("the file ends inside its header")
        self.position += length

    def take_string(self) -> str:
        length = self.take("<Q")[0]
        start = self.position
        self.skip(length)
        return self.buffer[start : self.position].decode("utf-8")

    def skip_value(self, type_id: int, nesting: int = 0) -> None:
        if type_id in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[type_id])
        elif type_id == _STRING:
            self.skip(self.take("<Q")[0])
        elif type_id == _ARRAY and nesting < 2:
            element_type, count = self.take("<IQ")
            if element_type in _SCALAR_BYTES:
                self.skip(count * _SCALAR_BYTES[element_type])
            elif element_type == _STRING:
                self.skip_strings(count)
            elif element_type != _ARRAY:
                self.fail(f"a metadata value has the unknown type {element_type}")
            else:
                for _ in range(count):
                    self.skip_value(element_type, nesting + 1)
        else:
            self.fail(f"a metadata value has the unknown type {type_id}")

    def skip_strings(self, count: int) -> None:
        """Step over an array of strings; vocabularies make this the header's hot loop."""
        if count > (self.size - self.position) // 8:
            self.fail("the file ends inside its header")
        position, end, buffer = self.position, self.size - 8, self.buffer
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position > end:
                self.fail("the file ends inside its header")
            position += 8 + unpack(buffer, position)[0]
        self.position = position
        self.skip(0)

    def alignment(self) -> int:
        if "general.alignment" not in self.entries:
            return 32
        type_id, position = self.entries["general.alignment"]
        value = _decode(self.buffer, type_id, position)[0] if type_id in _SCALARS else 0
        if not isinstance(value, int) or not 8 <= value <= 1 << 20 or value & (value - 1):
            self.fail("general.alignment is no power of two from 8 to 1048576")
        return value

    def take_tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.take_string()
        n_dimensions = self.take("<I")[0]
        if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
            self.fail(f"tensor {name} has {n_dimensions} dimensions")
        lengths = self.take(f"<{n_dimensions}Q")
        type_id, offset = self.take("<IQ")
        return name, tuple(reversed(lengths)), type_id, offset

    def check_tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> TensorInfo:
        if trit_types.is_trit_type(type_id):
            block_size = trit_types.BLOCK_SIZE
            block_bytes = trit_types.block_bytes(trit_types.TritType(type_id).depth)
        else:
            stock = _stock_type(type_id)
            if stock is None:
                self.fail(f"tensor {name} has the unknown type {type_id}")
            _, block_size, block_bytes = stock
        n_weights = 1
        for length in shape:
            n_weights *= length
        if n_weights == 0 or shape[-1] % block_size:
            self.fail(f"tensor {name} has a shape {shape} that its type cannot have")
        n_bytes = n_weights // block_size * block_bytes
        if offset + n_bytes > self.size:
            self.fail(f"tensor {name} reaches beyond the end of the file, which is truncated")
        return TensorInfo(name, shape, type_id, offset, n_bytes)

    def check_overlap(self) -> None:
        end, owner = 0, ""
        for info in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            if info.offset < end:
                self.fail(f"tensors {owner} and {info.name} overlap")
            end, owner = info.offset + info.n_bytes, info.name


_COMMON_TYPES = {F32: ("F32", 1, 4), F16: ("F16", 1, 2)}  # all that a trit file has, without importing gguf


@functools.cache
def _stock_type(type_id: int) -> tuple[str, int, int] | None:
    """Return name, weights per block and bytes per block of a ggml type, or None for an unknown id."""
    if type_id in _COMMON_TYPES:
        return _COMMON_TYPES[type_id]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    member = GGMLQuantizationType._value2member_map_.get(type_id)
    if not isinstance(member, GGMLQuantizationType) or member not in GGML_QUANT_SIZES:
        return None
    return (member.name, *GGML_QUANT_SIZES[member])

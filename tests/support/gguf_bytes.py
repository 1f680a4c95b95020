"""GGUF files built byte by byte, valid or deliberately invalid."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from random_inputs import CODEBOOK, random_levels

from cpu_kernels.packed_rows.pack import pack
from tritgguf.formats.trit_types import codebook_key

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, type_id: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", type_id) + value


def array(element_type: int, elements: Sequence[bytes], count: int | None = None) -> bytes:
    return struct.pack("<IQ", element_type, len(elements) if count is None else count) + b"".join(elements)


def floats(values: Sequence[float]) -> bytes:
    return array(FLOAT32, [struct.pack("<f", value) for value in values])


def tensor(name: str, shape: Sequence[int], type_id: int, offset: int, n_dimensions: int | None = None) -> bytes:
    """Return a tensor's header entry; `shape` is in NumPy order."""
    dimensions = len(shape) if n_dimensions is None else n_dimensions
    lengths = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return string(name) + struct.pack("<I", dimensions) + lengths + struct.pack("<IQ", type_id, offset)


@dataclass
class GgufBytes:
    """The parts of a file; the counts are the lengths of the lists unless they are given."""

    keys: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    key_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32

    @property
    def header(self) -> bytes:
        """The bytes before the padding and the data."""
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        key_count = len(self.keys) if self.key_count is None else self.key_count
        counts = struct.pack("<IQQ", self.version, tensor_count, key_count)
        return self.magic + counts + b"".join(self.keys) + b"".join(self.tensors)

    def write(self, path: Path) -> Path:
        header = self.header
        path.write_bytes(header + bytes(-len(header) % self.alignment) + self.data)
        return path


def trit_bytes(depth: int = 2, codebook: bytes | None = None) -> GgufBytes:
    """Return a file with a trit matrix `w` [3, 128] of `random_levels` and a vector `v` of 0 to 3."""
    levels, indices = random_levels(depth, 3, 128)
    data = pack(levels, indices, depth).tobytes()
    second = bytes(-len(data) % 32) + np.arange(4, dtype=np.float32).tobytes()
    keys = [key("general.architecture", STRING, string("llama")), key("trit.version", UINT32, struct.pack("<I", 1))]
    keys.append(key(codebook_key("w"), ARRAY, floats(CODEBOOK.tolist()) if codebook is None else codebook))
    tensors = [tensor("w", (3, 128), 10000 + depth, 0), tensor("v", (4,), 0, len(data) + -len(data) % 32)]
    return GgufBytes(keys, tensors, data + second)


def stack_bytes(codebook: bytes, shape: tuple[int, ...] = (3, 5, 128)) -> GgufBytes:
    """Return a file with a stack `w` of three trit matrices [5, 128], whose header may claim another shape."""
    levels, indices = random_levels(2, 15, 128)
    keys = [
        key("general.architecture", STRING, string("llama")),
        key("trit.version", UINT32, struct.pack("<I", 1)),
        key(codebook_key("w"), ARRAY, codebook),
    ]
    return GgufBytes(keys, [tensor("w", shape, 10002, 0)], pack(levels, indices, 2).tobytes())

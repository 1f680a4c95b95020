"""Mutations that know the fields of a file: bytes with marked fields, and JSON values."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_INTERESTING = (0, 1, 2, 3, 7, 8, 16, 31, 32, 63, 64, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 1 << 24, (1 << 31) - 1)
_LARGE = (1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_JSON_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 1 << 31, -(1 << 63), 1 << 64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "a", "..", "../../x", "/etc/passwd", "\0", "\ud800", "1", [], [[]], [1, [2]], {}, {"a": {}},
)  # fmt: skip


@dataclass
class MarkedBytes:
    """Bytes with their fields: (position, length) of integers and of texts."""

    data: bytearray = field(default_factory=bytearray)
    integers: list[tuple[int, int]] = field(default_factory=list)
    texts: list[tuple[int, int]] = field(default_factory=list)

    def integer(self, value: int, n_bytes: int) -> None:
        """Append an unsigned little-endian integer."""
        self.integers.append((len(self.data), n_bytes))
        self.data += value.to_bytes(n_bytes, "little")

    def string(self, text: str) -> None:
        """Append a GGUF string."""
        encoded = text.encode()
        self.integer(len(encoded), 8)
        self.texts.append((len(self.data), len(encoded)))
        self.data += encoded

    def plain(self, data: bytes) -> None:
        """Append bytes without fields."""
        self.data += data


def mark_gguf(path: str) -> MarkedBytes:
    """Return a GGUF file's bytes with the fields of its header marked; the file must be sound."""
    from tritgguf.formats.gguf_file import GgufFile

    file = GgufFile(path)
    marked, original = MarkedBytes(), memoryview(Path(path).read_bytes())
    marked.plain(bytes(original[:4]))
    for start, n_bytes in ((4, 4), (8, 8), (16, 8)):
        marked.integer(int.from_bytes(original[start : start + n_bytes], "little"), n_bytes)
    reader = _Walker(original, marked)
    for _ in file.metadata:
        reader.string()
        reader.value(reader.integer(4))
    for _ in file.tensors:
        reader.string()
        for _ in range(reader.integer(4)):
            reader.integer(8)
        reader.integer(4)
        reader.integer(8)
    marked.plain(bytes(original[len(marked.data) :]))
    return marked


class _Walker:
    """Copies a header field by field."""

    _SIZES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)

    def __init__(self, data: memoryview, marked: MarkedBytes) -> None:
        self._data, self._marked = data, marked

    def integer(self, n_bytes: int) -> int:
        position = len(self._marked.data)
        value = int.from_bytes(self._data[position : position + n_bytes], "little")
        self._marked.integer(value, n_bytes)
        return value

    def string(self) -> None:
        position = len(self._marked.data)
        length = struct.unpack_from("<Q", self._data, position)[0]
        self._marked.string(bytes(self._data[position + 8 : position + 8 + length]).decode())

    def value(self, type_id: int) -> None:
        if type_id == 8:
            self.string()
        elif type_id == 9:
            element = self.integer(4)
            for index in range(self.integer(8)):
                if element in (8, 9) or index < 4:  # mark only a few elements of long numeric arrays
                    self.value(element)
                else:
                    position = len(self._marked.data)
                    self._marked.plain(bytes(self._data[position : position + self._SIZES[element]]))
        else:
            self.integer(self._SIZES[type_id])


def mutate_bytes(marked: MarkedBytes, rng: random.Random) -> bytes:
    """Return a copy with one to three fields or ranges damaged."""
    data = bytearray(marked.data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.6 and marked.integers:
            position, n_bytes = rng.choice(marked.integers)
            _set_integer(data, position, n_bytes, rng)
        elif kind < 0.75 and marked.texts:
            position, length = rng.choice(marked.texts)
            for index in range(position, min(position + length, len(data))):
                if rng.random() < 0.3:
                    data[index] = rng.randrange(256)
        elif kind < 0.87 and data:
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind < 0.94:
            del data[rng.randrange(len(data) + 1) :]
        elif data:
            start = rng.randrange(len(data))
            data[start:start] = data[start : start + rng.randrange(1, 64)]
    return bytes(data)


def _set_integer(data: bytearray, position: int, n_bytes: int, rng: random.Random) -> None:
    if position + n_bytes > len(data):
        return
    old = int.from_bytes(data[position : position + n_bytes], "little")
    new = rng.choice(
        (
            rng.choice(_INTERESTING),
            rng.choice(_LARGE),
            old + rng.choice((-1, 1, 32, -32)),
            old * 2,
            old ^ (1 << rng.randrange(8 * n_bytes)),
            rng.getrandbits(8 * n_bytes),
        )
    )
    data[position : position + n_bytes] = (new % (1 << 8 * n_bytes)).to_bytes(n_bytes, "little")


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return a copy of a JSON value with one to three of its parts replaced, removed or duplicated."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _mutated(value, rng)
    return value


def _mutated(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.15:
            return {name: part for name, part in value.items() if name != key}
        if action < 0.25:
            return {**value, rng.choice(("", "x", key + key, "a.b")): value[key]}
        return {**value, key: _mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        action = rng.random()
        if action < 0.15:
            return value[:index] + value[index + 1 :]
        if action < 0.3:
            return value + value[index : index + 1]
        return [*value[:index], _mutated(value[index], rng), *value[index + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, value, -2 * value, 1 << 32))
    if isinstance(value, str) and value and rng.random() < 0.3:
        index = rng.randrange(len(value))
        return value[:index] + chr(rng.randrange(1, 0x3000)) + value[index + 1 :]
    return rng.choice(_JSON_VALUES)

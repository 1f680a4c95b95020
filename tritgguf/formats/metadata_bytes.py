"""Encode GGUF metadata.

gguf-py's writer packs arrays item by item, which takes seconds for the tokens and merges of a large vocabulary. The
values and their types are gguf-py's.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gguf import GGUFValue, GGUFValueType

_NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
"""Type -> NumPy's name of its encoding."""
_length = struct.Struct("<Q").pack
_type = struct.Struct("<I").pack


def encoded_metadata(metadata: Mapping[str, GGUFValue]) -> bytes:
    """Return the encoded keys and values, in their order.

    Raises ValueError for an empty array, an array of different types and a number outside its type's range.
    """
    parts: list[bytes] = []
    for key, value in metadata.items():
        kind = GGUFValueType(value.type)
        parts += [_strings([key]), _type(kind)]
        if kind is GGUFValueType.ARRAY:
            parts.append(_array(value.value, value.sub_type))
        else:
            parts.append(_items([value.value], kind))
    return b"".join(parts)


def _array(items: Sequence[Any], kind: GGUFValueType | None) -> bytes:
    """Return an encoded array; `kind` None means the type that gguf-py has for items of their class."""
    if len(items) == 0:
        raise ValueError("GGUF has no empty arrays")
    if isinstance(items, bytes):
        items, kind = list(items), GGUFValueType.UINT8
    if kind is None:
        if len(set(map(type, items))) > 1:
            raise ValueError("an array has items of different types")
        kind = GGUFValueType.get_type(items[0])
    return _type(kind) + _length(len(items)) + _items(items, kind)


def _items(items: Sequence[Any], kind: GGUFValueType) -> bytes:
    """Return encoded items without their type and number; an array of arrays has those for each of its items."""
    if kind is GGUFValueType.STRING:
        return _strings(items)
    if kind is GGUFValueType.ARRAY:
        return b"".join(_array(item, None) for item in items)
    try:
        return np.array(items, _NUMBERS[kind]).tobytes()
    except OverflowError as error:
        raise ValueError(str(error)) from error


def _strings(items: Sequence[str | bytes]) -> bytes:
    """Return encoded strings; bytes are UTF-8 already."""
    encoded = [item.encode() if isinstance(item, str) else item for item in items]
    return b"".join([part for text in encoded for part in (_length(len(text)), text)])

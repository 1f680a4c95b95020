"""Types of a kernel's arguments, and the arguments as numbers, without Numba.

A type is
- `int`, `float` or `bool`, or the dtype of a NumPy scalar, such as float32;
- `(dtype, dimensions, flags)` for an array, whose flags say whether it is contiguous and may be written;
- `(class, type, type ...)` for a tuple or a named tuple.

Numbers are int64 *slots*: a number is one, with the bits of its own type; an array is its address and shape, and its
strides too unless it is C-contiguous; a tuple is what its elements are, one behind the other.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

C_CONTIGUOUS, F_CONTIGUOUS, WRITABLE = 1, 2, 0x400  # NumPy's numbers
Type = Any

_PYTHON_TYPES: dict[str, type] = {"int64": int, "float64": float, "bool": bool}  # which Numba does not tell apart


def array_type(dtype: Any, dimensions: int, *, readonly: bool = False) -> Type:
    """Return the type of C-contiguous arrays."""
    return np.dtype(dtype), dimensions, C_CONTIGUOUS if readonly else C_CONTIGUOUS | WRITABLE


def describe(value: Any, slots: list[int]) -> Type:
    """Return the type of an argument and append its slots; TypeError for what kernels do not take."""
    kind = type(value)
    if kind is np.ndarray:
        flags = value.flags.num
        slots.append(value.ctypes.data)
        slots += value.shape
        if flags & C_CONTIGUOUS:
            return value.dtype, value.ndim, flags & (C_CONTIGUOUS | WRITABLE)
        slots += value.strides
        return value.dtype, value.ndim, flags & (F_CONTIGUOUS | WRITABLE)
    if kind is int or kind is bool:
        slots.append(value)
        return kind
    if isinstance(value, tuple):
        return (kind, *[describe(item, slots) for item in value])
    if kind is float:
        slots.append(_bits(struct.pack("<d", value)))
        return kind
    if isinstance(value, np.generic):
        slots.append(_bits(value.astype(value.dtype.newbyteorder("<")).tobytes()))
        return _PYTHON_TYPES.get(value.dtype.name, value.dtype)
    if isinstance(value, np.ndarray):  # a memory map
        return describe(value.view(np.ndarray), slots)
    raise TypeError(f"a kernel takes numbers, arrays and tuples, not {value!r:.60}")


def _bits(content: bytes) -> int:
    return int.from_bytes(content.ljust(8, b"\0"), "little", signed=True)


def name_of(type_: Type) -> str:
    """Return a type as a text that is the same in every process."""
    if isinstance(type_, tuple):
        first, *rest = type_
        if isinstance(first, type):
            return f"{first.__name__}({','.join(map(name_of, rest))})"
        return f"{first.str}[{rest[0]},{rest[1]}]"
    return type_.__name__ if isinstance(type_, type) else f"{type_.str}"

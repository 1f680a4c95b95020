"""Invalid trit tensors."""

from __future__ import annotations

import math
import struct
from pathlib import Path

from attack import Attack
from gguf_bytes import FLOAT32, STRING, array, floats, stack_bytes, string, trit_bytes

_AGAIN = "convert the model again"


def _codebook(name: str, codebook: bytes) -> Attack:
    def build(folder: Path) -> list[str]:
        return ["check", str(trit_bytes(2, codebook).write(folder / "evil.gguf"))]

    return Attack(name, build, ("evil.gguf", "tensor w", "codebook", _AGAIN))


def _stack(name: str, codebook: bytes, shape: tuple[int, ...], *message_parts: str) -> Attack:
    def build(folder: Path) -> list[str]:
        return ["check", str(stack_bytes(codebook, shape).write(folder / "evil.gguf"))]

    return Attack(name, build, ("evil.gguf", "tensor w", *message_parts))


def _version(version: int) -> Attack:
    def build(folder: Path) -> list[str]:
        parts = trit_bytes()
        parts.keys[1] = parts.keys[1][:-4] + struct.pack("<I", version)
        return ["inspect", str(parts.write(folder / "evil.gguf"))]

    return Attack(f"version {version} of the format", build, ("evil.gguf", f"version {version}", "newer tritgguf"))


def _word(folder: Path) -> list[str]:
    """Write a word whose product with 3**10 has the largest remainder, so it encodes no trits (docs/format.md)."""
    parts = trit_bytes()
    word = pow(3**10, -1, 1 << 16) * 0xFFFF % (1 << 16)
    parts.data = struct.pack("<H", word) + parts.data[2:]
    return ["check", str(parts.write(folder / "evil.gguf"))]


ATTACKS = [
    _codebook("a codebook of 26 scales", floats([1.0] * 26)),
    _codebook("a codebook of 28 scales", floats([1.0] * 28)),
    _codebook("a scale of NaN", floats([1.0] * 26 + [math.nan])),
    _codebook("a scale that is infinite", floats([math.inf] * 27)),
    _codebook("a negative scale", floats([-1.0] * 27)),
    _codebook("a codebook of strings", array(STRING, [string("1")] * 27)),
    _codebook("an empty codebook", array(FLOAT32, [])),
    _stack("codebooks of two matrices for a stack of three", floats([1.0] * 54), (3, 5, 128), "3 matrices", _AGAIN),
    _stack("codebooks of four matrices for a stack of three", floats([1.0] * 108), (3, 5, 128), "3 matrices", _AGAIN),
    _stack("more experts than the file has bytes", floats([1.0] * 27), (1 << 40, 5, 128), "reaches beyond"),
    _stack("a product of experts and rows beyond 2**64", floats([1.0] * 27), (1 << 40, 1 << 40, 128), "reaches beyond"),
    _stack("a stack without experts", floats([1.0] * 27), (0, 5, 128), "does not allow"),
    _version(0),
    _version(2),
    Attack("an invalid word", _word, ("evil.gguf", "tensor w", "again")),
]

"""Invalid GGUF headers: counts, lengths, types, shapes, offsets."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from attack import Attack
from gguf_bytes import ARRAY, FLOAT32, STRING, UINT32, GgufBytes, array, key, string, tensor, trit_bytes

F32, F16, Q8_0, TRIT2 = 0, 1, 8, 10002
_AGAIN = "fetch or write the file again"
_U32 = struct.pack("<I", 1)


def _header(name: str, change: Callable[[GgufBytes], GgufBytes | None], *message_parts: str) -> Attack:
    """Return an attack on `inspect` with a valid file whose parts `change` changes."""

    def build(folder: Path) -> list[str]:
        parts = trit_bytes()
        parts = change(parts) or parts
        return ["inspect", str(parts.write(folder / "evil.gguf"))]

    return Attack(name, build, ("evil.gguf", *message_parts, _AGAIN))


def _raw(name: str, data: bytes, *message_parts: str) -> Attack:
    def build(folder: Path) -> list[str]:
        (folder / "evil.gguf").write_bytes(data)
        return ["inspect", str(folder / "evil.gguf")]

    return Attack(name, build, ("evil.gguf", *message_parts))


def _set(**changes: object) -> Callable[[GgufBytes], None]:
    def change(parts: GgufBytes) -> None:
        for name, value in changes.items():
            setattr(parts, name, value)

    return change


def _with_key(entry: bytes) -> Callable[[GgufBytes], None]:
    return lambda parts: parts.keys.append(entry)


def _with_tensor(entry: bytes) -> Callable[[GgufBytes], None]:
    return lambda parts: parts.tensors.append(entry)


def _replace_w(entry: bytes) -> Callable[[GgufBytes], None]:
    def change(parts: GgufBytes) -> None:
        parts.tensors[0] = entry

    return change


def _nested(depth: int) -> bytes:
    value = array(UINT32, [_U32])
    for _ in range(depth):
        value = struct.pack("<IQ", ARRAY, 1) + value
    return value


ATTACKS = [
    _raw("not a GGUF file", b"GGML" + bytes(100), "not a GGUF file"),
    _raw("only the magic number", b"GGUF", "not a GGUF file"),
    _raw("counts without entries", b"GGUF" + struct.pack("<IQQ", 3, 5, 5), "ends inside its header", _AGAIN),
    _header("an unknown version", _set(version=99), "GGUF version 99"),
    _header("more tensors than any model has", _set(tensor_count=1 << 62), "claims more entries"),
    _header("more keys than any model has", _set(key_count=(1 << 64) - 1), "claims more entries"),
    _header("more keys than there are", _set(key_count=1000), "ends inside its header"),
    _header("a key longer than the file", _with_key(struct.pack("<Q", 1 << 40)), "ends inside its header"),
    _header("a key whose length is negative", _with_key(struct.pack("<q", -1)), "ends inside its header"),
    _header("a key that is not UTF-8", _with_key(key(b"\xff\xfe", UINT32, _U32)), "header is damaged"),
    _header("a string longer than the file", _with_key(key("k", STRING, struct.pack("<Q", 1 << 63))), "ends inside"),
    _header("an array of 2**62 numbers", _with_key(key("k", ARRAY, array(FLOAT32, [], 1 << 62))), "ends inside"),
    _header("an array of 2**60 strings", _with_key(key("k", ARRAY, array(STRING, [], 1 << 60))), "ends inside"),
    _header("an array of arrays of arrays", _with_key(key("k", ARRAY, _nested(9))), "unknown type 9"),
    _header("a value of an unknown type", _with_key(key("k", 77, _U32)), "unknown type 77"),
    _header("a key that occurs twice", _with_key(key("trit.version", UINT32, _U32)), "trit.version occurs twice"),
    _header(
        "an alignment of zero", _with_key(key("general.alignment", UINT32, struct.pack("<I", 0))), "general.alignment"
    ),
    _header(
        "an alignment of 2**31",
        _with_key(key("general.alignment", UINT32, struct.pack("<I", 1 << 31))),
        "general.alignment",
    ),
    _header("an alignment that is a string", _with_key(key("general.alignment", STRING, string("32"))), "general.alig"),
    _header("a tensor without dimensions", _replace_w(tensor("w", (), F32, 0)), "tensor w has 0 dimensions"),
    _header("a tensor of a thousand dimensions", _replace_w(tensor("w", (1,), F32, 0, 1000)), "tensor w has 1000"),
    _header("a tensor without weights", _replace_w(tensor("w", (0, 128), TRIT2, 0)), "tensor w has a shape (0, 128)"),
    _header("a product of dimensions beyond 2**64", _replace_w(tensor("w", (1 << 40, 1 << 40), F32, 0)), "tensor w"),
    _header(
        "a row length that is not a multiple of 64", _replace_w(tensor("w", (3, 100), TRIT2, 0)), "tensor w has a shape"
    ),
    _header("a row of partial blocks", _replace_w(tensor("w", (3, 100), Q8_0, 0)), "tensor w has a shape"),
    _header("a tensor of an unknown type", _replace_w(tensor("w", (3, 128), 4711, 0)), "the unknown type 4711"),
    _header("data beyond the end of the file", _replace_w(tensor("w", (3, 128), F16, 1 << 20)), "tensor w reaches"),
    _header("an offset close to 2**64", _replace_w(tensor("w", (3, 128), F16, (1 << 64) - 32)), "tensor w reaches"),
    _header("a misaligned offset", _replace_w(tensor("w", (3, 128), TRIT2, 1)), "tensor w does not start"),
    _header("overlapping tensors", _with_tensor(tensor("u", (4,), F32, 0)), "overlap"),
    _header("two tensors with one name", _with_tensor(tensor("v", (4,), F32, 0)), "same name"),
    _header("a tensor whose name is not UTF-8", _with_tensor(struct.pack("<Q", 2) + b"\xff\xff"), "header is damaged"),
    _header("data that was cut off", lambda parts: setattr(parts, "data", parts.data[:10]), "truncated"),
]

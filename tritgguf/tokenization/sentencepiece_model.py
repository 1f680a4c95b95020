"""Reading the parts of `tokenizer.model`, SentencePiece's protocol buffer, that GGUF needs.

Field numbers, from sentencepiece_model.proto:
ModelProto {1: pieces, 2: trainer_spec}, SentencePiece {1: piece, 2: score, 3: type}, TrainerSpec {3: model_type}.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tritgguf.errors import DamagedFileError, TritGgufError
from tritgguf.formats.checked import check_inside
from tritgguf.formats.file_kinds import foreign_kind

_BPE = 2
_NORMAL = 1
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """A token: text, score (higher scores merge first) and type (as in GGUF's token_type)."""

    text: str
    score: float
    type: int


def read_pieces(path: Path) -> list[Piece]:
    """Return the pieces of a SentencePiece BPE model in the order of their ids.

    Raises TritGgufError if the file is not a SentencePiece model, is truncated or has another model type (unigram).
    """
    check_inside(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TritGgufError(f"{path}: cannot be read ({error.strerror})") from error
    pieces: list[Piece] = []
    model_type: int | bytes = 1  # unigram, the default
    try:
        for field, value in _fields(data):
            if field == 1:
                pieces.append(_piece(_expect_bytes(value)))
            elif field == 2:
                model_type = dict(_fields(_expect_bytes(value))).get(3, model_type)
    except (ValueError, IndexError, TypeError, struct.error) as error:
        kind = foreign_kind(data)
        remedy = f"it {kind}" if kind else "provide a tokenizer.json instead"
        raise DamagedFileError(f"{path}: is not a SentencePiece model ({error}); {remedy}") from error
    if not pieces or model_type != _BPE:
        raise DamagedFileError(f"{path}: is not a SentencePiece model of type BPE; provide a tokenizer.json instead")
    return pieces


def _piece(data: bytes) -> Piece:
    text, score, piece_type = "", 0.0, _NORMAL
    for field, value in _fields(data):
        if field == 1:
            text = _expect_bytes(value).decode("utf-8")
        elif field == 2:
            score = struct.unpack("<f", _expect_bytes(value))[0]
        elif field == 3 and isinstance(value, int):
            piece_type = value
    return Piece(text, score, piece_type)


def _expect_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number instead of bytes")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a message; the value is an int for a varint, otherwise bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire_type = key & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire_type == _LENGTH:
            length, position = _varint(data, position)
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type}")
        if length > len(data) - position:
            raise ValueError("it ends too early")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than ten bytes")

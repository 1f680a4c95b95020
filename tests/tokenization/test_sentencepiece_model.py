"""SentencePiece models, read without the sentencepiece library."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from source_checks import tokenizer_values
from tiny_models import write_tokenizer_folder
from tokenizers import Tokenizer

from tritgguf.errors import TritGgufError
from tritgguf.tokenization.hf_to_gguf import HUGGINGFACE_JSON_KEY
from tritgguf.tokenization.sentencepiece_model import Piece, read_pieces


def field(number: int, wire_type: int, payload: bytes) -> bytes:
    length = bytes([len(payload)]) if wire_type == 2 else b""
    assert len(payload) < 128
    return bytes([number << 3 | wire_type]) + length + payload


def sentencepiece_model(pieces: list[Piece], model_type: int = 2) -> bytes:
    """Return a serialized SentencePiece model with an additional unknown field."""
    parts = [
        field(
            1,
            2,
            field(1, 2, piece.text.encode())
            + field(2, 5, struct.pack("<f", piece.score))
            + field(3, 0, bytes([piece.type])),
        )
        for piece in pieces
    ]
    trainer = field(4, 0, b"\x80\x01") + field(3, 0, bytes([model_type])) + field(10, 1, bytes(8))
    return b"".join(parts) + field(2, 2, trainer) + field(3, 2, b"\x0a\x00")


def test_a_folder_with_only_tokenizer_model_gives_the_same(tmp_path: Path) -> None:
    both = tokenizer_values(write_tokenizer_folder(tmp_path / "json", "sentencepiece"))
    columns = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
    pieces = [Piece(*row) for row in zip(*(both[column][:439] for column in columns), strict=True)]
    folder = write_tokenizer_folder(tmp_path / "model", "sentencepiece")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    alone = tokenizer_values(folder)
    for column in columns:
        assert alone[column] == both[column]
    first, second = (Tokenizer.from_str(values[HUGGINGFACE_JSON_KEY]) for values in (both, alone))
    for text in ("The quick  brown\nfox", "</s> caf\u00e9 \U0001f680", ""):
        assert first.encode(text).ids == second.encode(text).ids


def test_scores_come_from_tokenizer_model_where_there_is_one(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, "sentencepiece")
    pieces = [Piece(f"t{i}", -0.5 * i, TokenType.NORMAL) for i in range(10)]
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    assert tokenizer_values(folder)["tokenizer.ggml.scores"][3:10] == [-0.5 * i for i in range(3, 10)]


@given(data=st.binary(max_size=60), length=st.integers(0, 200))
def test_any_bytes_are_pieces_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int
) -> None:
    whole = sentencepiece_model([Piece("<unk>", 0.0, 2), Piece("\u2581a", -1.0, 1)])
    path = tmp_path_factory.getbasetemp() / "tokenizer.model"
    for content in (data, whole[:length], whole[:length] + data):
        path.write_bytes(content)
        try:
            assert all(isinstance(piece.text, str) for piece in read_pieces(path))
        except TritGgufError as error:
            assert str(error).startswith(f"{path}: is not a SentencePiece model")


def test_a_model_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model([Piece("a", 0.0, 1)])[:-1])
    with pytest.raises(TritGgufError, match="it ends too early"):
        read_pieces(path)


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model([Piece("a", 0.0, 1)], model_type=1))
    with pytest.raises(TritGgufError, match="of type BPE"):
        read_pieces(tmp_path / "tokenizer.model")

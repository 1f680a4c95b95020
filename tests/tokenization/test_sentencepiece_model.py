"""SentencePiece models, read without the sentencepiece library."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from source_checks import tokenizer_values
from tiny_models import write_tokenizer_folder
from tokenizers import Tokenizer

from tritgguf.errors import TritGgufError
from tritgguf.tokenization.chat_template import encode_chat
from tritgguf.tokenization.hf_to_gguf import HUGGINGFACE_JSON_KEY
from tritgguf.tokenization.sentencepiece_model import Piece, read_pieces
from tritgguf.tokenization.tokenizer import Tokenizer as TritTokenizer

COLUMNS = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")


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


def write_model_only(folder: Path, added: dict[str, Any] | None = None, **config: Any) -> Path:
    """Write a folder with tokenizer.model and, for transformers, one in `folder`-json with the same tokenizer.json."""
    twin = folder.with_name(f"{folder.name}-json")
    for path in (folder, twin):
        write_tokenizer_folder(path, "sentencepiece", **{"tokenizer_class": "LlamaTokenizer", **config})
        if added is not None:
            (path / "added_tokens.json").write_text(json.dumps(added))
    values = tokenizer_values(write_tokenizer_folder(folder.with_name(f"{folder.name}-plain"), "sentencepiece"))
    pieces = [Piece(*row) for row in zip(*(values[column][:439] for column in COLUMNS), strict=True)]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    return folder


TEXTS = (
    "The quick  brown\nfox",
    "</s> caf\u00e9 \U0001f680",
    " a leading space",
    "",
    "<|im_start|>user\nHi there<|im_end|> x<|im_end|>y",
)


@pytest.mark.parametrize("config", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
def test_a_folder_with_only_tokenizer_model_gives_transformers_ids(tmp_path: Path, config: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    folder = write_model_only(
        tmp_path / "m", {"<|im_end|>": 439, "<|im_start|>": 440}, eos_token="<|im_end|>", **config
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m-json")
    ours = Tokenizer.from_str(tokenizer_values(folder)[HUGGINGFACE_JSON_KEY])
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.encode(text).ids[0] == 1


def test_the_tokens_of_added_tokens_json(tmp_path: Path) -> None:
    folder = write_model_only(tmp_path / "m", {"<|im_end|>": 439, "<|im_start|>": 440}, eos_token="<|im_end|>")
    values = tokenizer_values(folder)
    assert values["tokenizer.ggml.tokens"][438:442] == ["\u2581", "<|im_end|>", "<|im_start|>", "[PAD441]"]
    assert values["tokenizer.ggml.token_type"][439:441] == [TokenType.CONTROL] * 2
    assert values["tokenizer.ggml.eos_token_id"] == 439
    ours = TritTokenizer(values)
    assert {2, 439} <= ours.stop_tokens
    assert ours.eos_token == "<|im_end|>"
    chat = encode_chat(ours, values["tokenizer.chat_template"], [{"role": "user", "content": "<|im_end|>"}])
    assert (chat.count(439), chat.count(440)) == (1, 2)  # the message's own is text


def test_added_tokens_json_that_repeats_the_first_pieces(tmp_path: Path) -> None:
    """As Mistral-7B-OpenOrca's, which llama.cpp's first converter refused."""
    added = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": 439, "<|im_start|>": 440}
    values = tokenizer_values(write_model_only(tmp_path / "m", added, eos_token="<|im_end|>"))
    assert values["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]) == (1, 439)
    ids = Tokenizer.from_str(values[HUGGINGFACE_JSON_KEY]).encode("<|im_start|>a<|im_end|></s>").ids
    assert [token for token in ids if token in added.values()] == [1, 440, 439, 2]


def test_special_tokens_map_names_the_special_ones(tmp_path: Path) -> None:
    folder = write_model_only(tmp_path / "m", {"[END]": 439, "[MORE]": 440})
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "[END]", "lstrip": False}}))
    values = tokenizer_values(folder)
    assert values["tokenizer.ggml.token_type"][439:441] == [TokenType.CONTROL, TokenType.USER_DEFINED]
    assert values["tokenizer.ggml.eos_token_id"] == 439


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"<|im_end|>": 500}, r"token id 500 does not fit config\.json's vocab_size of 448; .*resize_token_embeddings"),
        ({"<|im_end|>": -1}, "token id -1 does not fit"),
        ({"<|im_end|>": "439"}, r"added_tokens\.json: an entry of added_tokens has no id"),
    ],
)
def test_senseless_ids_in_added_tokens_json(tmp_path: Path, added: dict[str, Any], message: str) -> None:
    with pytest.raises(TritGgufError, match=message):
        tokenizer_values(write_model_only(tmp_path / "m", added))


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

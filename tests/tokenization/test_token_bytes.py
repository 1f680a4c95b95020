"""Bytes of tokens: joined, they are the text."""

from __future__ import annotations

import json

import pytest
from tiny_models import tiny_tokenizer_json

from tritgguf.tokenization.token_bytes import token_bytes
from tritgguf.tokenization.tokenizer import KEY_HUGGINGFACE, Tokenizer

TEXTS = ("The quick brown fox\n\tjumps", "żółw 亀 🐢 é", "a  b\r\n", "<0x41> \u2581", "")


@pytest.mark.parametrize("kind", ["smollm", "qwen2", "llama-bpe", "gpt-2", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_the_text(kind: str, text: str) -> None:
    tokenizer = Tokenizer({KEY_HUGGINGFACE: tiny_tokenizer_json(kind)})
    tokens = tokenizer.encode(text, add_special=False, parse_special=False)
    joined = b"".join(token_bytes(tokenizer, token) for token in tokens)
    if kind == "sentencepiece":  # it puts a space in front, and writes U+2581 for a space
        assert joined.decode() == (" " + text if text else "").replace("\u2581", " ")
    else:
        assert joined.decode() == text


def test_control_tokens_have_their_names_and_unknown_ones_nothing() -> None:
    tokenizer = Tokenizer({KEY_HUGGINGFACE: tiny_tokenizer_json("smollm")})
    names = {token["id"]: token["content"] for token in json.loads(tiny_tokenizer_json("smollm"))["added_tokens"]}
    assert {token: token_bytes(tokenizer, token).decode() for token in names} == names
    assert token_bytes(tokenizer, 447) == b""

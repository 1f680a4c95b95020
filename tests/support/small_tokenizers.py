"""Tiny tokenizers and their GGUF metadata."""

from __future__ import annotations

from typing import Any

from tiny_models import tiny_tokenizer_json

from tritgguf.tokenization.tokenizer import KEY_HUGGINGFACE, Tokenizer


def metadata(kind: str = "smollm", **keys: Any) -> dict[str, Any]:
    """Return the metadata of a file with a tiny tokenizer; `keys` are added under tokenizer.ggml."""
    model, pre, bos, eos = ("llama", "default", 1, 2) if kind == "sentencepiece" else ("gpt2", kind, 0, 2)
    entries = {"model": model, "pre": pre, "bos_token_id": bos, "eos_token_id": eos, **keys}
    return {
        KEY_HUGGINGFACE: tiny_tokenizer_json(kind),
        **{f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None},
    }


def tokenizer(kind: str = "smollm", **keys: Any) -> Tokenizer:
    return Tokenizer(metadata(kind, **keys))


def encode(tokens: Tokenizer, text: str) -> list[int]:
    return tokens.encode(text, add_special=False, parse_special=False)

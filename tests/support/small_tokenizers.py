"""Tiny tokenizers and their GGUF metadata."""

from __future__ import annotations

import json
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


HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
"""Control tokens of gpt-oss; an answer ends with one of the last two."""


def harmony_tokenizer() -> Tokenizer:
    """Return a tiny tokenizer with the control tokens of gpt-oss."""
    found = json.loads(tiny_tokenizer_json("smollm"))
    first = max(token["id"] for token in [*found["added_tokens"], *_entries(found)]) + 1
    for token, content in enumerate(HARMONY, first):
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        found["added_tokens"].append({"id": token, "content": content, **plain})
    ends = {"eos_token_id": first + 5, "eot_token_id": first + 6}
    return Tokenizer({**metadata("smollm", **ends), KEY_HUGGINGFACE: json.dumps(found)})


def _entries(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"id": token} for token in tokenizer["model"]["vocab"].values()]


def encode(tokens: Tokenizer, text: str) -> list[int]:
    return tokens.encode(text, add_special=False, parse_special=False)

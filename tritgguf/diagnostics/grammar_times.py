"""How long the constraint of a JSON schema takes for a token."""

from __future__ import annotations

import json
import time

from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.grammar import Grammar, json_schema_source
from tritgguf.tokenization.tokenizer import Tokenizer

_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "year": {"type": "integer", "minimum": 1900},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z ]+$"}},
        "size": {"anyOf": [{"type": "number"}, {"enum": ["small", "large"]}]},
    },
    "required": ["name", "year", "tags", "size"],
    "additionalProperties": False,
}
_ANSWER = {"name": "The quick brown fox jumps", "year": 2024, "tags": ["fox", "dog and fox"] * 8, "size": 1.5}


def grammar_seconds(file: GgufFile, vocab_size: int) -> float | None:
    """Return the mean time of a token's mask, in seconds; None without llguidance, or a tokenizer that it can read."""
    try:
        tokenizer = Tokenizer(file.metadata)
        grammar = Grammar(tokenizer, vocab_size, json_schema_source(_SCHEMA))
    except TritGgufError:
        return None
    tokens = tokenizer.encode(json.dumps(_ANSWER), add_special=False, parse_special=False)
    for _ in range(2):  # the first time builds the automaton
        constraint = grammar.constraint()
        constraint.mask()
        start = time.perf_counter()
        for token in tokens:
            constraint.accept(token)
            constraint.mask()
        seconds = time.perf_counter() - start
    return seconds / len(tokens)

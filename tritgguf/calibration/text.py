"""Calibration text as windows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tritgguf.errors import BadRequestError
from tritgguf.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tritgguf.sources.source import Source

WINDOW_TOKENS = 512
DEFAULT_TOKENS = 128 * WINDOW_TOKENS


def windows_of_text(source: Source, text: str, tokens: int) -> list[list[int]]:
    """Return windows of equal length from evenly spread positions of a text.

    Each starts with the BOS token where the model uses one. There are fewer than `tokens` tokens in all when the text
    is shorter; BadRequestError when it does not fill one window.
    """
    tokenizer = tokenizer_of(source)
    ids = plain_tokens(tokenizer, text)
    length = window_length(source)
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    body = length - len(bos)
    if len(ids) < body:
        raise BadRequestError(f"the calibration text has {len(ids)} tokens; it needs at least {body}, better {tokens}")
    count = min(max(1, tokens // length), len(ids) // body)
    starts = np.linspace(0, len(ids) - body, count).astype(int).tolist()
    return [[*bos, *ids[start : start + body]] for start in starts]


def window_length(source: Source) -> int:
    """Return how many tokens a window has: 512, or the model's context if that is shorter."""
    metadata = source.metadata
    context = metadata[f"{metadata['general.architecture'].value}.context_length"].value
    return min(WINDOW_TOKENS, int(context))


def plain_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text without BOS; the names of control tokens in it stay text."""
    return tokenizer.encode(text, add_special=False, parse_special=False)


def vocabulary_size(source: Source) -> int:
    """Return how many tokens the source's model knows."""
    return next(tensor.shape[0] for tensor in source.tensors if tensor.name == "token_embd.weight")


def tokenizer_of(source: Source) -> Tokenizer:
    """Return the tokenizer that the source's metadata carries."""
    return Tokenizer({key: value.value for key, value in source.metadata.items()}, name=source.name)

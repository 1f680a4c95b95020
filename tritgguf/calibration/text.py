"""Split calibration text into windows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tritgguf.errors import BadRequestError
from tritgguf.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tritgguf.sources.source import Source

WINDOW_TOKENS = 512
DEFAULT_TOKENS = 128 * WINDOW_TOKENS
DEFAULT_GENERATED_TOKENS = 32 * WINDOW_TOKENS  # fewer, because generating takes time


def windows_of_text(source: Source, text: str, tokens: int, window: int = WINDOW_TOKENS) -> list[list[int]]:
    """Return windows of equal length, see `window_length`, from evenly spaced positions of a text.

    Each window starts with the BOS token if the model uses one. The windows have `tokens` tokens in total, or fewer if
    the text is shorter. Raises BadRequestError if the text does not fill one window.
    """
    tokenizer = tokenizer_of(source)
    ids = plain_tokens(tokenizer, text)
    length = window_length(source, window)
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    body = length - len(bos)
    if len(ids) < body:
        better = f", better {tokens}" if tokens > length else ""
        raise BadRequestError(f"the calibration text has {len(ids)} tokens; it needs at least {body}{better}")
    count = min(max(1, tokens // length), len(ids) // body)
    starts = np.linspace(0, len(ids) - body, count).astype(int).tolist()
    return [[*bos, *ids[start : start + body]] for start in starts]


def window_length(source: Source, wanted: int = WINDOW_TOKENS) -> int:
    """Return the number of tokens in a window: as many as wanted, or the model's context length if that is shorter."""
    metadata = source.metadata
    context = metadata[f"{metadata['general.architecture'].value}.context_length"].value
    return min(wanted, int(context))


def plain_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize a text without BOS; names of control tokens in it are treated as plain text."""
    return tokenizer.encode(text, add_special=False, parse_special=False)


def vocabulary_size(source: Source) -> int:
    """Return the size of the source's vocabulary."""
    return next(tensor.shape[0] for tensor in source.tensors if tensor.name == "token_embd.weight")


def tokenizer_of(source: Source) -> Tokenizer:
    """Return the tokenizer stored in the source's metadata."""
    return Tokenizer({key: value.value for key, value in source.metadata.items()}, name=source.name)

"""Log probabilities of a prompt's own tokens, without keeping its logits.

A prompt of 2,000 tokens has 1.2 GB of logits if the vocabulary is Qwen's. A `PromptLogprobs` reduces the rows of each
forward pass to the few numbers that are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tritgguf.generation.sampling import TokenLogprobs


class PromptLogprobs:
    """Reduces logits behind a prompt's tokens to log probabilities; `reduce` is a request's `reduce_outputs`."""

    def __init__(self, prompt: Sequence[int], top: int) -> None:
        """Keep the log probability of each token of `prompt`, and those of the `top` likeliest in its place."""
        self._prompt, self._top = list(prompt), top

    def reduce(self, rows: np.ndarray, first: int) -> np.ndarray:
        """Return float64 [rows, 1 + 2 top]: the next token's log probability, the likeliest tokens, and theirs.

        `rows` are logits, float32 [rows, vocabulary], of the prompt's tokens from position `first` on.
        """
        kept = np.full((len(rows), 1 + 2 * self._top), np.nan)
        for place, row in enumerate(rows):
            top = min(self._top, len(row))
            normalizer = log_sum_exp(row)
            if first + place + 1 < len(self._prompt):
                kept[place, 0] = row[self._prompt[first + place + 1]] - normalizer
            if top:
                likeliest = np.argpartition(-row, top - 1)[:top] if top > 1 else np.array([row.argmax()])
                likeliest = likeliest[np.argsort(-row[likeliest], kind="stable")]
                kept[place, 1 : 1 + top] = likeliest
                kept[place, 1 + self._top : 1 + self._top + top] = row[likeliest] - normalizer
        return kept

    def of_tokens(self, outputs: np.ndarray) -> list[TokenLogprobs]:
        """Return those of the prompt's tokens from the second on; `outputs` are the request's."""
        found = []
        for token, row in zip(self._prompt[1:], outputs, strict=False):
            tokens, values = row[1 : 1 + self._top], row[1 + self._top :]
            top = tuple(
                (int(other), float(value)) for other, value in zip(tokens, values, strict=True) if value == value
            )
            found.append(TokenLogprobs(token, float(row[0]), top))
        return found


def log_sum_exp(logits: np.ndarray) -> float:
    """Return log(sum(exp(logits))) of a row, float32 [vocabulary], added up in float64."""
    largest = float(logits.max())
    return largest + math.log(float(np.exp(logits - np.float32(largest)).sum(dtype=np.float64)))

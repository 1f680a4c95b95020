"""Log probabilities of a prompt's own tokens, without keeping its logits.

A prompt of 2,000 tokens has 1.2 GB of logits if the vocabulary is Qwen's. A `PromptLogprobs` reduces the rows of each
forward pass to the few numbers that are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tritgguf.generation.sampling import TokenLogprobs, token_logprobs


class PromptLogprobs:
    """Reduces logits behind a prompt's tokens to log probabilities; `reduce` is a request's `reduce_outputs`."""

    def __init__(self, prompt: Sequence[int], top: int) -> None:
        """Keep the log probability of each token of `prompt`, and those of the `top` likeliest in its place."""
        self._prompt, self._top = list(prompt), top

    def reduce(self, rows: np.ndarray, first: int) -> np.ndarray:
        """Return float64 [rows, 1 + 2 top]: the next token's log probability, the likeliest tokens, and theirs.

        `rows` are logits, float32 [rows, vocabulary], of the prompt's tokens from position `first` on. What does not
        exist, such as a token behind the last, is NaN.
        """
        kept = np.full((len(rows), 1 + 2 * self._top), np.nan)
        for numbers, row, token in zip(kept, rows, self._prompt[first + 1 :], strict=False):
            found = token_logprobs(row, token, self._top)
            numbers[0] = found.logprob
            for place, (other, logprob) in enumerate(found.top):
                numbers[1 + place], numbers[1 + self._top + place] = other, logprob
        return kept

    def of_tokens(self, outputs: np.ndarray) -> list[TokenLogprobs]:
        """Return those of the prompt's tokens from the second on; `outputs` are the request's."""
        found = []
        for token, row in zip(self._prompt[1:], outputs, strict=False):
            tokens, values = row[1 : 1 + self._top], row[1 + self._top :]
            top = [(int(other), float(value)) for other, value in zip(tokens, values, strict=True) if value == value]
            found.append(TokenLogprobs(token, float(row[0]), tuple(top)))
        return found

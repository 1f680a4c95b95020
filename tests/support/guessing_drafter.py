"""A drafter that is right as often as one wants: it knows what each request gets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tritgguf.generation.request import RunningRequest


class GuessingDrafter:
    """Guesses right tokens and, from a random place of the draft on, wrong ones.

    Attributes:
        known: requests of which something is kept.
        drafted: how many tokens were guessed.

    """

    step_cost = 0.0

    def __init__(self, answer: Callable[[RunningRequest], Sequence[int]], vocabulary: int, seed: int = 0) -> None:
        """`answer` returns the tokens that a request gets alone, as far as they are known."""
        self.known: set[RunningRequest] = set()
        self.drafted = 0
        self._answer, self._vocabulary = answer, vocabulary
        self._numbers = np.random.default_rng(seed)

    def expect(self, requests: Sequence[RunningRequest], most: Sequence[int]) -> list[list[float]]:
        """Promise more than it holds, so that drafts have all lengths."""
        self.known.update(requests)
        return [[1.0] * int(self._numbers.integers(0, count + 1)) for count in most]

    def draft(self, requests: Sequence[RunningRequest], lengths: Sequence[int]) -> list[list[int]]:
        """Return drafts of just these lengths."""
        drafts = []
        for request, length in zip(requests, lengths, strict=True):
            generated = len(request.tokens) - request.prompt_length
            right = list(self._answer(request)[generated : generated + int(self._numbers.integers(0, length + 1))])
            wrong = self._numbers.integers(0, self._vocabulary, length - len(right)).tolist()
            drafts.append([*right, *wrong])
            self.drafted += length
        return drafts

    def forget(self, request: RunningRequest) -> None:
        """Forget a request."""
        self.known.discard(request)

"""Drafts from the text itself: what came after the last tokens when they came before, in the prompt or the answer."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from tritgguf.generation.request import RunningRequest

_SHORTEST = 2  # tokens that must be the same
_LONGEST = 32  # more of them say no more
_PLACES = 8  # the latest places of equal tokens that are compared
_FORGOTTEN = 64  # so many tokens of a kind are remembered before they count half

# How often the next token is what it was before: after 2 equal tokens, 3, 4 to 7, 8 to 15, and more.
_KINDS = (3, 4, 8, 16)
_ACCEPTED = (0.3, 0.45, 0.55, 0.75, 0.95)
_WEIGHT = 4.0  # what this is worth, in tokens


class _History:
    """The tokens of a request, by what came after each pair of them, and how often guesses were right."""

    def __init__(self) -> None:
        self.guess: list[int] = []
        self.equal = 0  # tokens in front of the guess that are the same in both places
        self._length = 0  # tokens that are indexed
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._right = [_WEIGHT * share for share in _ACCEPTED]
        self._guessed = [_WEIGHT] * len(_ACCEPTED)

    def extend(self, tokens: Sequence[int]) -> None:
        """Learn from the tokens that have come since, and index them."""
        for place, (guessed, token) in enumerate(zip(self.guess, tokens[self._length :], strict=False)):
            kind = _kind(self.equal + place)
            self._guessed[kind] += 1
            self._right[kind] += guessed == token
            if self._guessed[kind] > _FORGOTTEN:
                self._guessed[kind] /= 2
                self._right[kind] /= 2
            if guessed != token:
                break
        for end in range(max(self._length, _SHORTEST), len(tokens)):  # what comes after the last ones is not known
            places = self._places.setdefault(tuple(tokens[end - _SHORTEST : end]), [])
            places.append(end)
            del places[:-_PLACES]
        self._length = len(tokens)

    def look_up(self, tokens: Sequence[int], most: int) -> None:
        """Guess the next tokens: what came after the longest equal part; of several, after the latest."""
        self.guess, self.equal = [], 0
        start = 0
        for place in reversed(self._places.get(tuple(tokens[-_SHORTEST:]), [])):
            equal = _equal_tokens(tokens, place)
            if equal > self.equal:
                self.equal, start = equal, place
        if self.equal:
            period = len(tokens) - start  # a text that repeats itself goes on repeating
            self.guess = [tokens[start + place % period] for place in range(most)]

    def probabilities(self) -> list[float]:
        """Return how probably the first token of the guess is right, the first two, and so on."""
        probability, probabilities = 1.0, list[float]()
        for place in range(len(self.guess)):
            kind = _kind(self.equal + place)
            probability *= self._right[kind] / self._guessed[kind]
            probabilities.append(probability)
        return probabilities


class Lookup:
    """Drafts by looking up the last tokens in the text; it costs no pass of a model, and learns from every token."""

    step_cost = 0.0

    def __init__(self) -> None:
        self._histories: dict[RunningRequest, _History] = {}

    def expect(self, requests: Sequence[RunningRequest], most: Sequence[int]) -> list[list[float]]:
        """Look up every request's last tokens; see `Drafter.expect`."""
        expected = []
        for request, count in zip(requests, most, strict=True):
            history = self._histories.setdefault(request, _History())
            history.extend(request.tokens)
            history.look_up(request.tokens, count)
            expected.append(history.probabilities())
        return expected

    def draft(self, requests: Sequence[RunningRequest], lengths: Sequence[int]) -> list[list[int]]:
        """Return the beginnings of what was looked up."""
        return [self._histories[request].guess[:count] for request, count in zip(requests, lengths, strict=True)]

    def forget(self, request: RunningRequest) -> None:
        """Forget a request's text."""
        self._histories.pop(request, None)


def _kind(equal: int) -> int:
    """Return the place in `_ACCEPTED` of so many equal tokens."""
    return bisect.bisect_right(_KINDS, equal)


def _equal_tokens(tokens: Sequence[int], place: int) -> int:
    """Return how many tokens before `place` are the same as at the end, `_LONGEST` at most."""
    most, end = min(place, _LONGEST), len(tokens)
    return next((count for count in range(most) if tokens[place - 1 - count] != tokens[end - 1 - count]), most)

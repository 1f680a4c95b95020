"""Drafts that are looked up in the text."""

from __future__ import annotations

from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tritgguf.generation.lookup import Lookup
from tritgguf.generation.request import Request, RunningRequest

MOST = 8


def request_of(tokens: list[int]) -> RunningRequest:
    return RunningRequest(Request(tokens), list(tokens))


def looked_up(tokens: list[int], most: int = MOST) -> list[int]:
    """Return what a new lookup guesses."""
    lookup, request = Lookup(), request_of(tokens)
    (expected,) = lookup.expect([request], [most])
    (draft,) = lookup.draft([request], [most])
    assert len(draft) == len(expected)
    return draft


def test_nothing_is_guessed_where_nothing_is_repeated() -> None:
    assert looked_up([1]) == []
    assert looked_up([1, 2]) == []
    assert looked_up([1, 2, 3, 4, 2, 5]) == []


def test_what_came_after_the_same_tokens_comes_again() -> None:
    assert looked_up([1, 2, 3, 4, 5, 6, 2, 3], most=3) == [4, 5, 6]
    assert looked_up([1, 2, 3, 4, 5, 6, 2, 3], most=1) == [4]
    assert looked_up([1, 2, 3, 4, 5, 6, 2, 3], most=0) == []


def test_the_longest_equal_part_counts_then_the_latest() -> None:
    assert looked_up([9, 1, 2, 3, 7, 1, 2, 4, 9, 1, 2], most=1) == [3]
    assert looked_up([8, 1, 2, 3, 7, 1, 2, 4, 9, 1, 2], most=1) == [4]


def test_a_text_that_repeats_itself_goes_on_repeating() -> None:
    assert looked_up([1, 2, 3, 1, 2, 3]) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert looked_up([5, 5, 5]) == [5] * MOST


def naive(tokens: list[int]) -> int | None:
    """Return the token behind the longest equal part, searched without an index; of several, the latest."""
    best, found = 1, None
    for place in range(len(tokens) - 1, 1, -1):
        equal = 0
        while equal < min(place, 32) and tokens[place - 1 - equal] == tokens[len(tokens) - 1 - equal]:
            equal += 1
        if equal > best:
            best, found = equal, tokens[place]
    return found


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=20), steps=st.lists(st.integers(1, 4), max_size=6))
def test_an_index_that_grows_finds_what_a_search_finds(tokens: list[int], steps: list[int]) -> None:
    lookup, request, numbers = Lookup(), request_of(tokens), np.random.default_rng(len(tokens))
    with mock.patch("tritgguf.generation.lookup._PLACES", 100):
        for step in [*steps, 1]:
            lookup.expect([request], [1])
            (draft,) = lookup.draft([request], [1])
            expected = naive(request.tokens)
            assert draft == ([] if expected is None else [expected])
            request.tokens += numbers.integers(0, 4, step).tolist()


def test_guesses_that_were_right_make_the_next_ones_likelier() -> None:
    """Whether they were evaluated or not: every token that comes says whether the guess was right."""
    numbers = np.random.default_rng(0)
    text = numbers.integers(0, 1000, 200).tolist()

    def probability_at_end(continuation: list[int]) -> float:
        lookup, request = Lookup(), request_of([*text, *text[:4]])
        for token in continuation:
            lookup.expect([request], [MOST])
            request.tokens.append(token)
        request.tokens += text[20:24]
        (expected,) = lookup.expect([request], [MOST])
        assert expected == sorted(expected, reverse=True) and 0 < expected[-1] <= expected[0] <= 1
        return expected[0]

    wrong = [token for place in range(30) for token in (*text[5 * place : 5 * place + 4], 1000 + place)]
    right = text[4:19]
    assert probability_at_end(wrong) < 0.3 < probability_at_end([]) < probability_at_end(right)


def test_requests_are_apart_and_forgotten() -> None:
    lookup, first, second = Lookup(), request_of([1, 2, 3, 1, 2]), request_of([1, 2, 4, 1, 2])
    lookup.expect([first, second], [1, 1])
    assert lookup.draft([second, first], [1, 1]) == [[4], [3]]
    lookup.forget(first)
    lookup.forget(first)
    assert lookup.expect([second], [1]) != [[]]
    assert list(lookup._histories) == [second]

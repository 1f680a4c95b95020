"""Stop strings against a search that reads one character after the other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritgguf.errors import BadRequestError
from tritgguf.generation.stop_strings import StopStrings, stop_list

texts = st.text("ab🙂", max_size=30)
stop_strings = st.lists(st.text("ab🙂", max_size=5), max_size=4)


def text_before_the_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return the text before the stop string that is complete first, and whether there is one."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def feed(stops: list[str], pieces: list[str]) -> tuple[list[str], StopStrings]:
    strings = StopStrings(stops)
    shown = [strings.feed(piece) for piece in pieces]
    return [*shown, strings.flush()], strings


@given(text=texts, stops=stop_strings, data=st.data())
def test_any_pieces_give_the_text_before_the_first_stop(text: str, stops: list[str], data: st.DataObject) -> None:
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[start:end] for start, end in zip([0, *borders], [*borders, len(text)], strict=True)]
    expected, is_there = text_before_the_stop(text, stops)
    shown, strings = feed(stops, pieces)
    assert "".join(shown) == expected
    assert strings.found == is_there


@given(text=texts, stops=stop_strings)
def test_no_more_is_held_back_than_may_become_a_stop(text: str, stops: list[str]) -> None:
    strings, shown = StopStrings(stops), ""
    for end, character in enumerate(text, 1):
        shown += strings.feed(character)
        if strings.found:
            return
        held = text[len(shown) : end]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["END"], ["The dog", " sleeps"], ["The dog", " sleeps", ""]),
        (["END"], ["The dog EN", "D sleeps", " on"], ["The dog ", "", "", ""]),
        (["END"], ["The E", "N", "E"], ["The ", "", "EN", "E"]),
        (["\n\n"], ["a\n", "b\n", "\n", "c"], ["a", "\nb", "", "", ""]),
        (["aab"], ["aaa", "b"], ["a", "", ""]),
        (["bcd", "abcde"], ["abcd", "e"], ["a", "", ""]),
        (["bcd", "abcde"], ["abcde"], ["a", ""]),
        (["cd", "abcd"], ["xabcd"], ["x", ""]),
        (["late", "a"], ["x late a"], ["x l", ""]),
        (["", "x"], ["ab", "x"], ["ab", "", ""]),
    ],
)
def test_examples(stops: list[str], pieces: list[str], shown: list[str]) -> None:
    assert feed(stops, pieces)[0] == shown


def test_stop_strings_as_one_or_several() -> None:
    assert stop_list("END") == ["END"]
    assert stop_list(("a", "b")) == ["a", "b"]
    assert stop_list(None) == []


@pytest.mark.parametrize("wrong", [5, [5], ["a", None], b"a"])
def test_what_is_no_stop_string(wrong: Any) -> None:
    with pytest.raises(BadRequestError, match=r"^a stop string is a text, not"):
        stop_list(wrong)

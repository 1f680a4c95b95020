"""Wrapping of a text that comes in pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritgguf.cli.word_wrap import WordWrap, columns

WORDS = st.text("abcdefg,.\u00e9\u0301", min_size=1, max_size=15)


def wrapped(pieces: list[str], width: int) -> str:
    wrap = WordWrap(lambda: width)
    return "".join(map(wrap.feed, pieces)) + wrap.flush()


def cut(text: str, lengths: list[int]) -> list[str]:
    """Cut a text into pieces of these lengths, in turns."""
    pieces, place = list[str](), 0
    turns = itertools.cycle(lengths)
    while place < len(text):
        length = next(turns)
        pieces.append(text[place : place + length])
        place += length
    return pieces


@given(
    lines=st.lists(st.lists(WORDS, max_size=12), min_size=1, max_size=4),
    width=st.integers(15, 60),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_lines_break_at_the_last_space_that_fits(lines: list[list[str]], width: int, lengths: list[int]) -> None:
    text = "\n".join(" ".join(words) for words in lines)
    result = wrapped(cut(text, lengths), width)
    assert result == wrapped([text], width)  # whatever the pieces are
    found = result.split("\n")
    assert max(map(columns, found)) <= width
    assert " ".join(found).split() == text.split()
    for words in lines:  # greedily filled lines, one after the other
        expected = [""]
        for word in words:
            longer = f"{expected[-1]} {word}".lstrip(" ") if expected[-1] else word
            expected = [*expected[:-1], longer] if columns(longer) <= width else [*expected, word]
        assert found[: len(expected)] == expected
        found = found[len(expected) :]


def test_text_far_from_the_margin_passes_at_once() -> None:
    wrap = WordWrap(lambda: 40)
    assert [wrap.feed(piece) for piece in ("The", " d", "og", " sleeps")] == ["The", " d", "og", " sleeps"]


def test_a_word_near_the_margin_waits_for_its_end() -> None:
    wrap = WordWrap(lambda: 30)
    pieces = ["Twelve", " chars", " sle", "eps", " incompre", "hensibly"]
    assert [wrap.feed(piece) for piece in pieces] == ["Twelve", " chars", "", "", " sleeps", ""]
    assert wrap.flush() == "\nincomprehensibly"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aaaa bbbb", "aaaa bbbb"),
        ("aaaaa bbbbb", "aaaaa\nbbbbb"),
        ("aaaaaaaaaaaaa b", "aaaaaaaaaaaaa b"),  # longer than a line: the terminal breaks it
        ("aaaa      bbbbb", "aaaa\nbbbbb"),
        ("- a\n  bb", "- a\n  bb"),
        ("```\naaaaaa bbbbbb\n```\naaaaaa bbbbbb", "```\naaaaaa bbbbbb\n```\naaaaaa\nbbbbbb"),  # code is copied
        ("\u4f60\u597d\u4f60\u597d\u4f60\u597d", "\u4f60\u597d\u4f60\u597d\u4f60\n\u597d"),
        ("a\tb\tc", "a\tb\nc"),
        ("e\u0301" * 9 + " b", "e\u0301" * 9 + "\nb"),
        ("", ""),
    ],
)
def test_ten_columns(text: str, expected: str) -> None:
    width = 10 if "e\u0301" not in text else 9
    assert wrapped([text], width) == expected
    assert wrapped(list(text), width) == expected


def test_a_window_that_is_resized() -> None:
    width = 10
    wrap = WordWrap(lambda: width)
    shown = wrap.feed("aaaa bbbb ")
    width = 20
    assert shown + wrap.feed("cccc dddd eeee ") + wrap.flush() == "aaaa bbbb cccc dddd\neeee "

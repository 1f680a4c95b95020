"""Breaking a text at spaces to fit the terminal, while it is still being written."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

_LONG_WORD = 16  # columns that are left when the beginning of a word is shown before its end is known
_TAB = 8
_FENCE = "```"


class WordWrap:
    """Breaks lines between words. Code between lines of ``` stays as it is, so that it can be copied.

    A word near the margin is held back until its end is known; other text passes at once.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        """Wrap at `width()` columns; it is called for every piece, because a window may be resized."""
        self._width = width
        self._column = 0
        self._gap = ""  # spaces before the held word
        self._word = ""
        self._is_open = False  # whether the beginning of the word has been let through
        self._line_start = ""
        self._in_code = False

    def feed(self, piece: str) -> str:
        """Take the next piece of the text; return what can be shown of the text so far."""
        width = max(1, self._width())
        shown = "".join(self._take(character, width) for character in piece)
        free = width - self._column - columns(self._gap, self._column) - columns(self._word)
        if self._word and (self._is_open or self._in_code or free >= _LONG_WORD):
            shown += self._place(width)
            self._is_open = True
        return shown

    def flush(self) -> str:
        """Return what is still held back, at the end of the text."""
        return self._place(max(1, self._width()))

    def _take(self, character: str, width: int) -> str:
        if character == "\n":
            shown = self._place(width) + character
            if self._line_start.startswith(_FENCE):
                self._in_code = not self._in_code
            self._column, self._gap, self._line_start = 0, "", ""
            return shown
        if len(self._line_start) < len(_FENCE):
            self._line_start = (self._line_start + character).lstrip()
        if character in " \t":
            shown = self._place(width) if self._word or self._is_open else ""
            self._gap += character
            return shown
        if columns(character) == 2:  # Chinese and Japanese lines break between any two characters
            shown = self._place(width)
            self._word = character
            return shown + self._place(width)
        self._word += character
        return ""

    def _place(self, width: int) -> str:
        """Return the held word with its gap, or with a line feed where it does not fit."""
        gap, word, length = self._gap, self._word, columns(self._word)
        self._gap = self._word = ""
        gap_length = columns(gap, self._column)
        fits = self._column + gap_length + length <= width
        if fits or self._is_open or self._in_code or not self._column:
            shown, self._column = gap + word, self._column + gap_length + length
        elif word:
            shown, self._column = "\n" + word, length
        else:
            shown = ""  # spaces at the margin
        if self._column > width:
            self._column = (self._column - 1) % width + 1
        self._is_open = False
        return shown


def columns(text: str, start: int = 0) -> int:
    """Return how many columns a text takes; `start` is where it begins, which matters for tabs."""
    column = start
    for character in text:
        if character == "\t":
            column += _TAB - column % _TAB
        elif unicodedata.east_asian_width(character) in "WF":
            column += 2
        elif unicodedata.category(character) not in ("Mn", "Me", "Cf"):
            column += 1
    return column - start

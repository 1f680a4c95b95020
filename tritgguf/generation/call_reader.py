"""Reads a tool call, a JSON object, while it is being written."""

from __future__ import annotations

import json
from typing import Any

_NAMES_OF_ARGUMENTS = ("arguments", "parameters")


class CallReader:
    """Reads `{"name": ..., "arguments": {...}}`, in any order, as its text comes.

    Attributes:
        text: what has been read.
        name: the function's; None until it is known.
        call_id: the call's, where the model gives one.
        is_complete: whether the object has ended.
        has_failed: whether it is no such object.

    """

    def __init__(self, name: str | None = None) -> None:
        """Begin; with a `name`, the text is that of the arguments alone."""
        self.text = ""
        self.name: str | None = None
        self.call_id: str | None = None
        self.is_complete = self.has_failed = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._key: str | None = None
        self._start: int | None = None  # of the string, or of the value of the key
        self._delivered = 0  # characters of the arguments
        self._arguments: str | None = None  # once they are complete
        self._is_bare = name is not None
        if name is not None:
            self.feed(f'{{"name": {json.dumps(name)}, "arguments": ')
            self._prefix = len(self.text)

    def feed(self, text: str) -> str:
        """Read on; return what is left behind the object's end."""
        for place, character in enumerate(text):
            if self.is_complete or self.has_failed:
                return text[place:]
            self._read(character)
            self.text += character
        return ""

    def take_arguments(self) -> str:
        """Return the text of the arguments that has come since the last time; nothing before the name is known."""
        if self.name is None:
            return ""
        text = self._arguments
        if text is None and self._key in _NAMES_OF_ARGUMENTS and self._start is not None and self._depth >= 2:
            text = self.text[self._start :]
        if text is None:
            text = "{}" if self.is_complete else ""
        taken, self._delivered = text[self._delivered :], max(self._delivered, len(text))
        return taken

    def raw(self) -> str:
        """Return what the model has written."""
        return self.text[self._prefix :] if self._is_bare else self.text

    def _read(self, character: str) -> None:
        end = len(self.text) + 1  # behind this character
        if self._in_string:
            self._read_in_string(character, end)
        elif character == '"':
            self._in_string = True
            if self._depth == 1 and self._start is None:
                self._start = end - 1
            self.has_failed = self._depth == 0
        elif character in "{[":
            if self._depth == 0:
                self.has_failed = character == "["
            elif self._depth == 1:
                self._begin_value(end)
            self._depth += 1
        elif character in "}]":
            self._close(end)
        elif self._depth == 1 and character == ",":
            self._end_value(end - 1)
            self._key = None
        elif self._depth == 1 and character not in " \t\r\n:":
            self._begin_value(end)
        elif self._depth == 0 and not character.isspace():
            self.has_failed = True

    def _read_in_string(self, character: str, end: int) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if self._depth == 1 and self._key is None:
                self._key, self._start = str(self._decoded(self.text[self._start :] + '"')), None
            elif self._depth == 1:
                self._end_value(end, last='"')

    def _begin_value(self, end: int) -> None:
        if self._key is None:
            self.has_failed = True
        elif self._start is None:
            self._start = end - 1

    def _close(self, end: int) -> None:
        self._depth -= 1
        if self._depth == 1:
            self._end_value(end, last="}")
            self.is_complete = self._is_bare and self._arguments is not None
        elif self._depth == 0:
            self._end_value(end - 1)
            self.is_complete = True
        elif self._depth < 0:
            self.has_failed = True

    def _end_value(self, end: int, last: str = "") -> None:
        """Note the value that ends here, if there is one; `last` is its last character, not in the text yet."""
        if self._start is None:
            return
        text, self._start = self.text[self._start : end] + last, None
        if self._key in _NAMES_OF_ARGUMENTS:
            decoded = self._decoded(text) if text.startswith('"') else None  # some models write them as a text
            self._arguments = decoded if isinstance(decoded, str) else text
        elif self._key in ("name", "id"):
            value = self._decoded(text)
            if isinstance(value, str) and self._key == "name":
                self.name = value
            elif isinstance(value, str):
                self.call_id = value

    def _decoded(self, text: str) -> Any:
        try:
            return json.loads(text, strict=False)
        except ValueError:
            self.has_failed = True
            return None

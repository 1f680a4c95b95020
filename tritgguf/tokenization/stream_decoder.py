"""Streaming detokenizer that never splits a character."""

from __future__ import annotations

from collections.abc import Container, Sequence

from tritgguf.tokenization.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_CHARACTER_BYTES = 4
_CONTEXT_TOKENS = 8


class StreamDecoder:
    """Decodes tokens to text one by one, never splitting a character.

    A token may end inside a character's UTF-8 bytes, which decode to a replacement character. Such text is held back
    until the next tokens complete the character. Some tokenizers drop the space before the first word of a text, so a
    token is decoded together with the tokens before it. `context` are the tokens before the first one, if any. Control
    tokens have no text, but for those of `shown`, whose names are returned.

    Attributes:
        holds_back: whether a character is incomplete, so that some of the text is held back.

    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), shown: Container[int] = ()) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._window = list(context[-_CONTEXT_TOKENS:])  # tokens already returned as text, then incomplete ones
        while tokenizer.decode(self._window).startswith(_REPLACEMENT):
            del self._window[0]
        self._restart(0)

    def _restart(self, first: int) -> None:
        """Drop the window's first `first` tokens; all its text has been returned."""
        del self._window[:first]
        self._context_length = len(self._window)
        self._returned = len(self._tokenizer.decode(self._window))  # characters of the window that were returned
        self._incomplete = 0  # tokens that did not complete a character
        self.holds_back = False

    def step(self, token: int) -> str:
        """Take the next token and return the text that it completes, possibly none."""
        if not self._tokenizer.has_text(token):
            is_shown = token in self._shown and token in self._tokenizer.added_tokens
            return self.flush() + str(self._tokenizer.added_tokens[token].content) if is_shown else ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        # A character has at most four bytes; if four tokens do not complete one, the text is invalid UTF-8.
        complete = text if self._incomplete + 1 >= _MAX_CHARACTER_BYTES else text.rstrip(_REPLACEMENT)
        new = complete[self._returned :]
        if new and complete == text:
            self._restart(self._context_length)
        elif new:
            self._returned, self._incomplete = len(complete), 0
        elif complete != text:
            self._incomplete += 1
        self.holds_back = complete != text
        return new

    def flush(self) -> str:
        """Return the text that is held back; an incomplete character becomes the replacement character."""
        rest = self._tokenizer.decode(self._window)[self._returned :]
        self._restart(self._context_length)
        return rest

"""Tokens to text as they come, never splitting a character."""

from __future__ import annotations

from collections.abc import Sequence

from tritgguf.tokenization.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_CHARACTER_BYTES = 4
_CONTEXT_TOKENS = 8


class StreamDecoder:
    """Turns tokens into text as they come, never splitting a character.

    A token may end inside a character's UTF-8 bytes, which decodes to a replacement character: that is held
    back until the next tokens complete it. And some tokenizers drop the space in front of a text's first
    word, so a token is decoded behind those before it. `context` are the tokens of the text that this one
    continues, if it does.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context[-_CONTEXT_TOKENS:])  # tokens shown before, then those not complete yet
        while tokenizer.decode(self._window).startswith(_REPLACEMENT):
            del self._window[0]
        self._restart(0)

    def _restart(self, first: int) -> None:
        """Let the window start at its token `first`; all its text has been returned."""
        del self._window[:first]
        self._context_length = len(self._window)
        self._shown = len(self._tokenizer.decode(self._window))  # characters of the window already returned
        self._waiting = 0  # tokens that did not complete a character

    def step(self, token: int) -> str:
        """Take the next token and return the text that is complete with it: often its own, sometimes none."""
        if not self._tokenizer.has_text(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        # No character is longer than four bytes: what does not become one by then is broken text.
        complete = text if self._waiting + 1 >= _MAX_CHARACTER_BYTES else text.rstrip(_REPLACEMENT)
        new = complete[self._shown :]
        if new and complete == text:
            self._restart(self._context_length)
        elif new:
            self._shown, self._waiting = len(complete), 0
        elif complete != text:
            self._waiting += 1
        return new

    def flush(self) -> str:
        """Return what is still held back; an incomplete character becomes the replacement character."""
        rest = self._tokenizer.decode(self._window)[self._shown :]
        self._restart(self._context_length)
        return rest

"""The bytes of single tokens: a token may hold a part of a character, which no text can show."""

from __future__ import annotations

import functools
import re

from tritgguf.tokenization.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's table: printable bytes of Latin-1 stand for themselves, the others for U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + place): byte for place, byte in enumerate(others)}}


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Return what a token adds to a text, in UTF-8; nothing for one that is not in the vocabulary.

    A control token gives its name. The space that a SentencePiece tokenizer drops at the beginning of a text is there.
    """
    added = tokenizer.added_tokens.get(token)
    if added is not None:
        return str(added.content).encode("utf-8", "replace")
    text = tokenizer.vocabulary_entry(token)
    if tokenizer.is_byte_level:
        table = _byte_of_character()
        return b"".join(bytes([table[c]]) if c in table else c.encode("utf-8", "replace") for c in text)
    if match := _BYTE_TOKEN.fullmatch(text):
        return bytes([int(match[1], 16)])
    return text.replace(_SPACE, " ").encode("utf-8", "replace")

"""Reading text that a user gives: prompts, calibration and evaluation texts, chat templates.

Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. Anything else is refused: a guessed encoding or replacement
characters would silently change the text.
"""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.formats.file_kinds import foreign_kind, is_lfs_pointer

# The mark of UTF-32 starts with that of UTF-16, so it comes first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_STANDARD_INPUT = "-"


def read_text(path: str | Path) -> str:
    """Return the text of a file, or of standard input for `-`, with its line ends; raises as `decode_text` does.

    Raises TritGgufError if the file cannot be read.
    """
    if str(path) == _STANDARD_INPUT:
        if sys.stdin is None:
            raise BadRequestError("standard input is closed; give a file instead of -")
        return decode_text(sys.stdin.buffer.read(), "standard input")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TritGgufError(f"{path}: cannot be read ({error.strerror}); give a text file") from error
    return decode_text(data, str(path))


def is_pipe(path: str | Path) -> bool:
    """Tell whether what `read_text` reads is gone afterwards: standard input or another pipe."""
    return str(path) == _STANDARD_INPUT or Path(path).is_fifo()


def decode_text(data: bytes, where: str) -> str:
    """Return the text of a file's bytes, without its byte order mark.

    Raises BadRequestError, which names the offset, for bytes that are no text.
    """
    if is_lfs_pointer(data):
        raise BadRequestError(f"{where}: {foreign_kind(data)}")
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        offset = len(mark) + error.start
        raise _not_text(
            data, where, f"is not {encoding.upper()} text: byte 0x{data[offset]:02X} at offset {offset}"
        ) from error
    if "\0" in text:
        offset = len(mark) + len(text[: text.index("\0")].encode(encoding))
        raise _not_text(
            data, where, f"is not text, or UTF-16 without a byte order mark: a zero byte at offset {offset}"
        )
    return text


def _not_text(data: bytes, where: str, fault: str) -> BadRequestError:
    return BadRequestError(f"{where}: {foreign_kind(data) or f'{fault}; save it as UTF-8'}")

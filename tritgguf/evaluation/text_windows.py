"""Split an evaluation text into independent windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from tritgguf.errors import TritGgufError

if TYPE_CHECKING:
    from tritgguf.formats.gguf_file import GgufFile

WINDOW_TOKENS = 512
_LISTS = (".tokens", ".scores", ".token_type", ".merges")


def shipped_text() -> str:
    """Return the default text of `verify`: prose, a recipe, a table, Python code."""
    return resources.files("tritgguf").joinpath("data/verify_text.txt").read_text(encoding="utf-8")


def split_windows(tokens: Sequence[int], *, count: int, window: int, bos: int | None) -> list[list[int]]:
    """Split the first `count` tokens of a text into windows of `window` tokens; the last one may be shorter.

    Every window starts with `bos` unless it is None; it counts as a token. A last window that predicts no token of the
    text is dropped. Raises TritGgufError if no window is left.
    """
    start = [] if bos is None else [bos]
    windows: list[list[int]] = []
    position = 0
    while position < len(tokens) and count >= 2:
        piece = tokens[position : position + min(window, count) - len(start)]
        position += len(piece)
        if len(start) + len(piece) < 2:
            break
        windows.append([*start, *piece])
        count -= len(windows[-1])
    if not windows:
        raise TritGgufError("verify needs at least two tokens; give a longer text or a larger number of tokens")
    return windows


def tokenized_windows(file: GgufFile, text: str, tokens: int) -> list[list[int]]:
    """Return the first `tokens` tokens of a text as windows of up to 512 tokens, with the tokenizer of `file`."""
    from tritgguf.tokenization.tokenizer import Tokenizer

    tokenizer = Tokenizer(file.metadata, name=str(file.path))
    context = file.metadata[f"{file.metadata['general.architecture']}.context_length"]
    return split_windows(
        tokenizer.encode(text, add_special=False, parse_special=False),
        count=tokens,
        window=min(WINDOW_TOKENS, context),
        bos=tokenizer.bos_id if tokenizer.add_bos else None,
    )


def common_windows(files: Sequence[GgufFile], text: str, tokens: int) -> list[list[int]]:
    """Return the windows of `tokenized_windows`, which must be equal for all files; else TritGgufError."""
    windows = tokenized_windows(files[0], text, tokens)
    for file in files[1:]:
        if _what_splits(file) != _what_splits(files[0]) and tokenized_windows(file, text, tokens) != windows:
            raise TritGgufError(
                f"{file.path} splits the text into other tokens or windows than {files[0].path}; verify it alone"
            )
    return windows


def _what_splits(file: GgufFile) -> dict[str, Any]:
    """Return the entries of a file that determine its tokens and windows; making a tokenizer of them takes longer.

    Lists, which take long to read, are only for programs without the tokenizer of Hugging Face.
    """
    names = ["general.architecture", f"{file.metadata['general.architecture']}.context_length"]
    names += [name for name in file.metadata if name.startswith("tokenizer.") and not name.endswith(_LISTS)]
    return {name: file.metadata[name] for name in names}

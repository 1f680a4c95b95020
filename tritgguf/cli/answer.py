"""Showing an answer while it is generated, and how fast it was."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tritgguf.cli import terminal
from tritgguf.cli.layout import terminal_width
from tritgguf.cli.word_wrap import WordWrap
from tritgguf.text_format import strip_control_characters

if TYPE_CHECKING:
    from tritgguf.generation.loaded_model import LoadedModel
    from tritgguf.generation.result import Generation, Timings


class AnswerWriter:
    """Writes an answer to stdout as it comes: on a terminal without control characters and wrapped, else unchanged."""

    def __init__(self) -> None:
        self._wrap = WordWrap(lambda: terminal_width(sys.stdout)) if sys.stdout.isatty() else None

    def write(self, piece: str) -> None:
        """Write a piece of the answer immediately."""
        if self._wrap is not None:
            piece = self._wrap.feed(strip_control_characters(piece))
        sys.stdout.write(piece)
        sys.stdout.flush()

    def end(self) -> None:
        """Write what is held back, and end the line."""
        print("" if self._wrap is None else self._wrap.flush(), flush=True)


def print_context_note(model: LoadedModel, answer: Generation) -> None:
    """Print a note if an answer ended because the context was full."""
    if answer.finish_reason == "context":
        size = model.context
        terminal.note(f"note: the context of {size} tokens is full, the answer ends here; --ctx-size makes room")


def print_timings(timings: Timings, *, with_load: bool = True) -> None:
    """Print a generation's speed, in one line like llama.cpp's, with the time that loading took or without."""
    drafts = f" | drafts {timings.drafted_tokens} tokens, {timings.acceptance_rate:.0%} accepted"
    load = f"load {timings.load_seconds:.2f} s | " if with_load else ""
    terminal.note(
        f"{load}prompt {timings.prompt_tokens} tokens, {timings.prompt_tokens_per_second:.1f} tokens/s"
        f" | decode {timings.decode_tokens} tokens, {timings.decode_tokens_per_second:.1f} tokens/s"
        f"{drafts if timings.drafted_tokens else ''}",
        dim=True,
    )

"""The calibration text that the options of `convert` and `calibrate` ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError

if TYPE_CHECKING:
    from tritgguf.conversion.own_text import SavedText


@dataclass(frozen=True)
class TextOptions:
    """What the options say about the text; raises TritGgufError where they contradict each other.

    Attributes:
        file: the text; None for one that the model itself writes.
        own: whether the user asks for a text that the model itself writes.
        tokens: the length of the text; None for the default.
        seed: of a text that the model itself writes.

    """

    file: Path | None
    own: bool
    tokens: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.file is not None and self.own:
            raise TritGgufError("--text and --self both say what to calibrate on; give one of them")

    @property
    def ask_for_text(self) -> bool:
        """Whether the user names a text."""
        return self.file is not None or self.own


def read_windows(
    source: str, options: TextOptions, threads: int | None, saved: SavedText | None = None
) -> tuple[list[list[int]], str]:
    """Return the text that the options ask for, as windows of tokens, and where it comes from."""
    from tritgguf.conversion.own_text import calibration_windows
    from tritgguf.sources.open import open_source

    with terminal.progress(in_bytes=False) as report:
        return calibration_windows(
            open_source(source),
            options.file,
            options.tokens,
            seed=options.seed,
            threads=threads,
            saved=saved,
            progress=lambda done, total: report("writing a text", done, total),
        )

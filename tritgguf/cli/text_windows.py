"""The calibration text selected by the options of `convert` and `calibrate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritgguf.cli import terminal
from tritgguf.cli.options import UsageError

if TYPE_CHECKING:
    from tritgguf.conversion.own_text import SavedText
    from tritgguf.sources.source import Source


@dataclass(frozen=True)
class TextOptions:
    """The options for the calibration text; raises UsageError if they contradict each other.

    Attributes:
        file: the text file; None for self-generated text.
        own: whether the user requests self-generated text.
        tokens: length of the text; None for the default.
        seed: seed of self-generated text.
        own_tokens: length of the self-generated text that is added to the file's; None for none.

    """

    file: Path | None
    own: bool
    tokens: int | None
    seed: int
    own_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.file is not None and self.own:
            raise UsageError("--text and --self both select the calibration text; give one of them")
        if self.file is None and self.own_tokens is not None:
            raise UsageError("--own-text adds to the text of --text; --self --tokens N generates all of the text")

    @property
    def is_given(self) -> bool:
        """Whether the user chose a text."""
        return self.file is not None or self.own


def read_windows(
    source: str,
    options: TextOptions,
    threads: int | None,
    saved: SavedText | None = None,
    announce: Callable[[Source, int], None] = lambda source, tokens: None,
    step: str = "",
) -> tuple[list[list[int]], str]:
    """Return the selected text as windows of tokens, and its name.

    The source and the packages that calibrating needs are looked at first: generating a text takes minutes. `announce`
    is called with the source and the number of tokens, before a text is generated that is the model's alone. `step` is
    shown before the progress.
    """
    from tritgguf.calibration.text import DEFAULT_GENERATED_TOKENS
    from tritgguf.conversion.own_text import calibration_windows
    from tritgguf.reference.model import require_torch
    from tritgguf.sources.open import open_source

    opened = open_source(source)
    require_torch()
    if options.file is None:
        announce(opened, options.tokens or DEFAULT_GENERATED_TOKENS)
    with terminal.progress(in_bytes=False) as report:
        windows, name = calibration_windows(
            opened,
            options.file,
            options.tokens,
            own_tokens=options.own_tokens or 0,
            seed=options.seed,
            threads=threads,
            saved=saved,
            progress=lambda done, total: report(f"{step}generating text", done, total),
        )
    used = sum(map(len, windows))
    if options.file is not None:
        announce(opened, used)
    if options.own_tokens is None and used != (options.tokens or used):
        windows_of = f"{len(windows)} windows of {len(windows[0])}"
        terminal.note(f"note: {used} tokens are used instead of {options.tokens}, which is {windows_of}")
    return windows, name

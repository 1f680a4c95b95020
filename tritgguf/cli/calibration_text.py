"""The calibration text that the options of `convert` and `calibrate` ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError

if TYPE_CHECKING:
    from tritgguf.conversion.own_text import KeptText


def read_calibration_text(
    source: str,
    text: Path | None,
    own_text: bool,
    tokens: int | None,
    seed: int,
    threads: int | None,
    kept: KeptText | None = None,
) -> tuple[list[list[int]], str]:
    """Return the calibration text that the options ask for, as windows of tokens, and where it comes from."""
    from tritgguf.conversion.own_text import calibration_windows
    from tritgguf.sources.open import open_source

    if text is not None and own_text:
        raise TritGgufError("--text and --self both say what to calibrate on; give one of them")
    with terminal.progress(in_bytes=False) as report:
        return calibration_windows(
            open_source(source),
            text,
            tokens,
            seed=seed,
            threads=threads,
            kept=kept,
            progress=lambda done, total: report("writing a text", done, total),
        )

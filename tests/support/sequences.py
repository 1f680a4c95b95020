"""A model with one sequence, as most tests need it."""

from __future__ import annotations

from typing import Any

from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime.model import Model
from tritgguf.runtime.single_sequence import SingleSequence


def open_sequence(
    file: GgufFile, *, context: int | None = None, cache_type: str | None = None, **options: Any
) -> SingleSequence:
    """Return an empty sequence of a model; `options` are those of `Model`."""
    return SingleSequence(Model(file, **options), context, cache_type=cache_type)

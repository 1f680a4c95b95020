"""Helpers of the tests of sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import PADDED_VOCABULARY

from tritgguf.errors import TritGgufError
from tritgguf.sources.open import open_source
from tritgguf.tokenization.hf_to_gguf import tokenizer_metadata


def fails(location: Path | str, message: str) -> None:
    """Assert that opening a source fails with a one-line error that matches `message`."""
    with pytest.raises(TritGgufError, match=message) as caught:
        open_source(location)
    assert "\n" not in str(caught.value)


def tokenizer_values(folder: Path, vocabulary: int = PADDED_VOCABULARY) -> dict[str, Any]:
    """Return the metadata of a folder's tokenizer, key -> value; assert that there are no warnings."""
    metadata, warnings = tokenizer_metadata(folder, vocabulary, add_space_prefix_key=True)
    assert warnings == []
    return {key: value.value for key, value in metadata.items()}

"""What several tests of sources need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import PADDED_VOCABULARY

from tritgguf.errors import TritGgufError
from tritgguf.sources.open import open_source
from tritgguf.tokenization.hf_to_gguf import tokenizer_metadata


def fails(location: Path | str, message: str) -> None:
    """Assert that a source is refused with one line that matches `message`."""
    with pytest.raises(TritGgufError, match=message) as caught:
        open_source(location)
    assert "\n" not in str(caught.value)


def tokenizer_values(folder: Path, vocabulary: int = PADDED_VOCABULARY) -> dict[str, Any]:
    """Return key -> plain value of a folder's tokenizer, which must give no warnings."""
    metadata, warnings = tokenizer_metadata(folder, vocabulary, add_space_prefix_key=True)
    assert warnings == []
    return {key: value.value for key, value in metadata.items()}

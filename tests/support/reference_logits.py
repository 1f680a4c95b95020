"""The logits of a trit file beside those of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sequences import open_sequence

from tritgguf.formats.gguf_file import GgufFile
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source

# More than a window. With the seed 4, two experts of gpt-oss with YaRN are equal to 1e-5, and 16 bits swap them.
TOKENS = np.random.default_rng(5).integers(0, 256, 64).tolist()


def check_logits(folder: Path, file: GgufFile) -> None:
    """Compare a prompt at once and token by token: exact to 1e-5, with activations of 16 bits to 1e-3."""
    reference = ReferenceModel.open(open_source(str(folder)))
    reference.load_file(file)
    expected = reference.logits(TOKENS)
    largest = np.abs(expected).max()
    sequence = open_sequence(file, context=len(TOKENS), exact=True, cache_type="f32")
    assert np.abs(sequence.forward(TOKENS, all_logits=True) - expected).max() < 1e-5 * largest
    sequence = open_sequence(file, context=len(TOKENS), prefill_bits=16, cache_type="f32")
    assert np.abs(sequence.forward(TOKENS, all_logits=True) - expected).max() < 1e-3 * largest
    sequence.truncate(0)
    found = np.array([sequence.forward([token]) for token in TOKENS])
    assert np.abs(found - expected).max() < 1e-3 * largest

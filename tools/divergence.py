"""How far is a model, as it is loaded, from one whose logits are known? What the tools that judge by KL share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tritgguf.reference_model import ReferenceModel
from tritgguf.verify import Comparison, compare_logits


def divergence(model: ReferenceModel, windows: Sequence[Sequence[int]], expected: Sequence[np.ndarray]) -> Comparison:
    """Compare a model's logits on some windows of tokens with others, float32 [tokens, vocabulary] of each window."""
    return Comparison.concatenate(
        [
            compare_logits(logits, model.logits(window), window[1:])
            for window, logits in zip(windows, expected, strict=True)
        ]
    )

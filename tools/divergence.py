"""How far is a model from another? What the tools that judge by KL share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tritgguf.evaluation.divergence import Comparison, compare_logits


def divergence(
    windows: Sequence[Sequence[int]], reference: Iterable[np.ndarray], logits: Iterable[np.ndarray]
) -> Comparison:
    """Compare a model's logits on some windows of tokens with the reference's, both [tokens, vocabulary] by window."""
    return Comparison.concatenate(
        [
            compare_logits(expected, found, window[1:])
            for window, expected, found in zip(windows, reference, logits, strict=True)
        ]
    )

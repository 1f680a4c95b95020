"""More text than there is: pieces of windows in new orders, with some tokens replaced.

Training on the original model's predictions needs no text that anybody wrote: the original says what follows any
tokens. So every pass sees other windows, and the model cannot learn the windows by heart (`docs/quality.md`).
"""

from __future__ import annotations

import numpy as np

_PIECES = 2  # per window
_REPLACED = 0.15  # of the tokens, on average; a window has between none and twice as many


def mixed_windows(windows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return windows of the same number and length, made of all pieces of the given ones; int [windows, tokens].

    Replaced tokens are drawn from the text itself. The same seed and epoch give the same windows.
    """
    random = np.random.default_rng([seed, epoch])
    count, length = windows.shape
    pieces = windows if length % _PIECES else windows.reshape(count * _PIECES, -1)
    mixed = random.permutation(pieces).reshape(count, length)
    is_replaced = random.random(mixed.shape) < 2 * _REPLACED * random.random((count, 1))
    return np.where(is_replaced, random.choice(windows.ravel(), mixed.shape), mixed)

"""What a pool of pages needs to know of a model, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from tritgguf.architectures.short_convolutions import ShortConvolutions


def pool_config(head_dim: int, *, hidden: int = 16, taps: int = 0, **entries: Any) -> Any:
    """Return the part of a `ModelConfig` that `KVPool` reads, of a model with one key-value head in one layer.

    With `taps`, a second layer has a short convolution. `entries` are further entries.
    """
    convolutions = ShortConvolutions(frozenset([1]), taps) if taps else None
    return SimpleNamespace(
        dimensions=SimpleNamespace(
            layers=1 + bool(taps), kv_heads=1, head_dim=head_dim, hidden=hidden, convolutions=convolutions
        ),
        attention_layers=1,
        slots=np.zeros(1 + bool(taps), np.int64),
        projected_columns=3 * hidden if taps else 0,
        **entries,
    )

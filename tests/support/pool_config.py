"""What a pool of pages needs to know of a model, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from tritgguf.architectures.short_convolutions import ShortConvolutions


def pool_config(
    head_dim: int, *, layers: int = 1, kv_heads: int = 1, hidden: int = 16, taps: int = 0, **entries: Any
) -> Any:
    """Return the part of a `ModelConfig` that `KVPool` reads.

    With `taps`, a layer with a short convolution comes after those with attention. `entries` are further entries.
    """
    convolutions = ShortConvolutions(frozenset([layers]), taps) if taps else None
    return SimpleNamespace(
        dimensions=SimpleNamespace(
            layers=layers + bool(taps),
            kv_heads=kv_heads,
            head_dim=head_dim,
            hidden=hidden,
            convolutions=convolutions,
            delta_net=None,
        ),
        attention_layers=layers,
        slots=np.array([*range(layers), *[0] * bool(taps)], np.int64),
        state_shape=(0, 0),
        **entries,
    )

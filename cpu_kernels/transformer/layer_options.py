"""What sets one family of transformers apart from another, as the kernels take it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class LayerOptions(NamedTuple):
    """Options that are the same for every token."""

    epsilon: np.float32
    """Of the norms."""
    residual_scale: np.float32
    """Factor on the outputs of attention and feed-forward before they are added to the residual stream."""
    gelu: bool
    """Whether the gate is GELU in its tanh form, or SiLU."""
    interleaved: bool
    """Whether a head rotates pairs (2i, 2i + 1), as GGUF's `llama` does, or (i, i + half)."""
    attention_scale: np.float32
    """Factor on the products of queries and keys."""
    softcap: np.float32
    """Bound c on attention scores: c tanh(score / c); 0 for none."""
    normalizes_together: bool
    """Whether the heads of the queries (and those of the keys) are normalized as one vector, or each by itself."""
    windows: np.ndarray
    """int64 [layers]: how many positions, its own included, a token sees; 0 for all."""
    rotations: np.ndarray
    """int64 [layers]: which rotation table a layer takes."""

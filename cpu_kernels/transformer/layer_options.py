"""The options in which transformer families differ, as the kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SILU, GELU, CLAMPED_SILU = 0, 1, 2
ATTENTION, SHORT_CONVOLUTION, DELTA_NET = 0, 1, 2


class LayerOptions(NamedTuple):
    """Options of a model's layers; they are the same for every token."""

    epsilon: np.float32
    """Epsilon of the norms."""
    residual_scale: np.float32
    """Factor of the outputs of attention and feed-forward before they are added to the residual stream."""
    activation: int
    """The feed-forward's activation: SILU, GELU (tanh approximation) or CLAMPED_SILU; see `swiglu`."""
    interleaved: bool
    """Whether RoPE rotates pairs (2i, 2i + 1) of a head, as for GGUF's `llama`, instead of (i, i + half)."""
    rotated_pairs: int
    """How many pairs of a head RoPE rotates, which is `half`; elements behind them stay as they are."""
    gates_heads: bool
    """Whether a gate follows each query head: the head's attention is multiplied with its sigmoid."""
    attention_scale: np.float32
    """Factor of the products of queries and keys."""
    softcap: np.float32
    """Softcap c of attention scores: c tanh(score / c); 0 for none."""
    normalizes_together: bool
    """Whether one RMS norm spans all query heads, and one all key heads, instead of one norm per head."""
    kinds: np.ndarray
    """int64 [layers]: what mixes the tokens of a layer: ATTENTION, SHORT_CONVOLUTION or DELTA_NET."""
    windows: np.ndarray
    """int64 [layers]: the sliding window, in positions, including the token's own; 0 for none."""
    rotations: np.ndarray
    """int64 [layers]: the index of each layer's rotation table."""
    sinks: np.ndarray
    """float32 [layers, heads]: a score that is added to every softmax of a query head; [layers, 0] for none."""

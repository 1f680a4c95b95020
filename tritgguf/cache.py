"""The key-value cache: as large as the tokens seen so far need, up to the context."""

from __future__ import annotations

import numpy as np

from cpu_kernels.decode import Cache
from tritgguf.model_config import ModelConfig

_FIRST_CAPACITY = 256


class KeyValueCache:
    """Keys and values of every layer, in arrays that grow.

    A context of 8,192 tokens takes 380 MB even for a model of 135M parameters, and a long one of a large model more
    than a machine has. What is never written should neither be reserved nor cleared.

    Attributes:
        context: the most tokens it may hold.
        arrays: what the kernels read and write, valid until the next `reserve`.

    """

    def __init__(self, config: ModelConfig, context: int, threads: int) -> None:
        """Start small; `threads` is the number of threads that need room for attention scores."""
        self.context = context
        self._config = config
        self._score_rows = max(config.dimensions.heads, threads)
        self.arrays = self._allocate(min(context, _FIRST_CAPACITY))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all, keeping what is stored; `tokens` is at most the context."""
        capacity = self.arrays.keys.shape[2]
        if tokens <= capacity:
            return
        old = self.arrays
        self.arrays = self._allocate(min(self.context, max(tokens, 2 * capacity)))
        self.arrays.keys[:, :, :capacity] = old.keys
        self.arrays.values[:, :, :capacity] = old.values

    def _allocate(self, capacity: int) -> Cache:
        sizes = self._config.dimensions
        shape = (sizes.layers, sizes.kv_heads, capacity, sizes.head_dim)
        angles = np.outer(np.arange(capacity), self._config.rotation_frequencies)
        return Cache(
            keys=np.zeros(shape, np.float32),
            values=np.zeros(shape, np.float32),
            cosines=np.cos(angles).astype(np.float32),
            sines=np.sin(angles).astype(np.float32),
            scores=np.zeros((self._score_rows, capacity), np.float32),
        )

"""The key-value cache: as large as the tokens seen so far need, up to the context."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.transformer.attention import Cache, Scratch, make_scratch, padded_dimension
from cpu_kernels.transformer.attention_tile import PANEL
from tritgguf.errors import TritGgufError
from tritgguf.machine import machine_memory_bytes
from tritgguf.runtime.config import ModelConfig

# As llama.cpp names them. Kernels take float16 as its bits.
CACHE_TYPES: dict[str, np.dtype[Any]] = {"f16": np.dtype(np.uint16), "f32": np.dtype(np.float32)}
DEFAULT_CACHE_TYPE = "f16"
_FIRST_CAPACITY = 256


def cache_bytes(config: ModelConfig, tokens: int, cache_type: str = DEFAULT_CACHE_TYPE) -> int:
    """Return how much memory keys, values and rotations of so many tokens take, in bytes."""
    sizes, places = config.dimensions, -(-tokens // PANEL) * PANEL
    of_head = padded_dimension(sizes.head_dim) * CACHE_TYPES[cache_type].itemsize
    rotations = len(config.rotations) * sizes.head_dim * np.dtype(np.float32).itemsize
    return places * (2 * sizes.layers * sizes.kv_heads * of_head + rotations)


def check_cache_fits(config: ModelConfig, context: int, cache_type: str, where: str) -> None:
    """Raise TritGgufError when a full cache of this context needs more memory than the machine has free."""
    memory, needed = machine_memory_bytes(), cache_bytes(config, context, cache_type)
    if memory is not None and needed > memory[1]:
        raise TritGgufError(
            f"{where}: a context of {context} tokens needs {needed:,} bytes of memory, of which {memory[1]:,} are free;"
            " use a smaller one (-c)"
        )


class KeyValueCache:
    """Keys and values of every layer, in arrays that grow.

    A context of 8,192 tokens takes 190 MB even for a model of 135M parameters, and a long one of a large model more
    than a machine has. What is never written should neither be reserved nor cleared.

    Attributes:
        context: the most tokens it may hold.
        arrays: what the kernels read and write, valid until the next `reserve`.

    """

    def __init__(self, config: ModelConfig, context: int, threads: int, cache_type: str = DEFAULT_CACHE_TYPE) -> None:
        """Start small; `threads` is the number of threads that will work on it, `cache_type` a key of CACHE_TYPES.

        Raises TritGgufError for an unknown type.
        """
        if cache_type not in CACHE_TYPES:
            raise TritGgufError(f"a cache cannot hold {cache_type}; choose from {', '.join(CACHE_TYPES)}")
        self.context = context
        self._config = config
        self._dtype = CACHE_TYPES[cache_type]
        sizes = config.dimensions
        self._scratch = make_scratch(sizes.heads, sizes.kv_heads, sizes.head_dim, threads)
        self.arrays = self._allocate(min(context, _FIRST_CAPACITY))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all, keeping what is stored; `tokens` is at most the context."""
        old, capacity = self.arrays, self.arrays.cosines.shape[1]
        if tokens <= capacity:
            return
        self.arrays = self._allocate(min(self.context, max(tokens, 2 * capacity)))
        self.arrays.keys[:, :, : old.keys.shape[2]] = old.keys
        self.arrays.values[:, :, :, :capacity] = old.values

    def _allocate(self, capacity: int) -> Cache:
        return _allocate(self._config, capacity, self._dtype, self._scratch)


def caches_of_texts(config: ModelConfig, texts: int, context: int, threads: int) -> Cache:
    """Return a float16 cache of `context` places for each of several texts; keys and values have an axis for them."""
    sizes = config.dimensions
    scratch = make_scratch(sizes.heads, sizes.kv_heads, sizes.head_dim, threads)
    return _allocate(config, context, CACHE_TYPES[DEFAULT_CACHE_TYPE], scratch, texts)


def _allocate(config: ModelConfig, capacity: int, dtype: np.dtype[Any], scratch: Scratch, *texts: int) -> Cache:
    """Return arrays of at least this capacity, in whole panels, with axes for texts in front, if there are any."""
    sizes = config.dimensions
    panels, padded = -(-capacity // PANEL), padded_dimension(sizes.head_dim)
    heads = (*texts, sizes.layers, sizes.kv_heads)
    places, rotations = np.arange(panels * PANEL), config.rotations
    angles = np.stack([np.outer(places, rotation.frequencies) for rotation in rotations])
    lengths = np.array([rotation.length for rotation in rotations])[:, np.newaxis, np.newaxis]
    return Cache(
        keys=np.zeros((*heads, panels, padded, PANEL), dtype),
        values=np.zeros((*heads, padded // PANEL, panels * PANEL, PANEL), dtype),
        cosines=(lengths * np.cos(angles)).astype(np.float32),
        sines=(lengths * np.sin(angles)).astype(np.float32),
        scratch=scratch,
    )

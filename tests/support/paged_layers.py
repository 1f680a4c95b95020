"""Random keys and values of one sequence in pages, and their float64 copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpu_kernels.transformer.attend_token import Scratch, make_scratch
from cpu_kernels.transformer.attention_tile import PANEL
from cpu_kernels.transformer.kv_pages import PAGE, KeyValues, padded_dimension


def angles(positions: int, dim: int) -> np.ndarray:
    return np.outer(np.arange(positions), 10.0 ** -np.linspace(0, 2, dim // 2))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def as_stored(x: np.ndarray, dtype: type) -> np.ndarray:
    """Return float32 numbers in the element type of pages."""
    return x.astype(np.float16).view(np.uint16) if dtype is np.uint16 else x


def as_float64(stored: np.ndarray) -> np.ndarray:
    return (stored.view(np.float16) if stored.dtype == np.uint16 else stored).astype(np.float64)


NO_STATES: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] = (
    np.zeros((0, 0, 0), np.float32),
    np.zeros(0, np.int64),
    np.zeros((0, 0), np.int64),
    np.zeros((0, 0), np.int64),
)
"""What `KeyValues` has of a model without states."""


class PagedLayers:
    """Pages of one sequence, for some layers; they are in reverse order in memory.

    Keys and values are read and written as arrays [layers, kv_heads, positions, padded_dim].
    """

    def __init__(self, layers: int, kv_heads: int, positions: int, dim: int, dtype: type) -> None:
        self.shape = (layers, kv_heads, -(-positions // PAGE) * PAGE, padded_dimension(dim))
        self.dim = dim
        heads = layers * kv_heads * PAGE * self.shape[3]
        self.pages: np.ndarray = np.zeros((self.shape[2] // PAGE, 2, heads), dtype)
        self.table = np.array([[page.ctypes.data for page in self.pages[::-1]]], np.int64)

    def read(self, part: int) -> np.ndarray:
        """Return all keys (part 0) or values (part 1), in the stored element type."""
        layers, kv_heads, _, padded = self.shape
        pages = []
        for page in self.pages[::-1, part]:
            if part == 0:
                in_order = page.reshape(layers, kv_heads, PAGE // PANEL, padded, PANEL).transpose(0, 1, 2, 4, 3)
            else:
                in_order = page.reshape(layers, kv_heads, padded // PANEL, PAGE, PANEL).transpose(0, 1, 3, 2, 4)
            pages.append(in_order.reshape(layers, kv_heads, PAGE, padded))
        return np.concatenate(pages, axis=2)

    def write(self, part: int, numbers: np.ndarray) -> None:
        """Store all keys (part 0) or values (part 1), given as `read` returns them."""
        layers, kv_heads, positions, padded = self.shape
        for number, first in enumerate(range(0, positions, PAGE)):
            some = numbers[:, :, first : first + PAGE]
            if part == 0:
                packed = some.reshape(layers, kv_heads, PAGE // PANEL, PANEL, padded).transpose(0, 1, 2, 4, 3)
            else:
                packed = some.reshape(layers, kv_heads, PAGE, padded // PANEL, PANEL).transpose(0, 1, 3, 2, 4)
            self.pages[-1 - number, part] = packed.reshape(-1)

    @property
    def keys(self) -> np.ndarray:
        """Float64 [kv_heads, positions, dim] of the first layer."""
        return as_float64(self.read(0))[0, :, :, : self.dim]

    @property
    def values(self) -> np.ndarray:
        return as_float64(self.read(1))[0, :, :, : self.dim]

    def key_values(self) -> KeyValues:
        """Return the kernels' argument; the sequence has index 0."""
        position_angles = angles(self.shape[2], self.dim)[np.newaxis]
        layers, kv_heads, _, padded = self.shape
        cosines, sines = np.cos(position_angles).astype(np.float32), np.sin(position_angles).astype(np.float32)
        slots = np.arange(layers)
        return KeyValues(
            self.table, self.pages[0, 0, :1], layers, kv_heads, padded, cosines, sines, slots, 0, 0, *NO_STATES
        )

    def scratch(self, heads: int, threads: int) -> Scratch:
        return make_scratch(1, heads, self.shape[1], self.dim, threads)


def random_layers(
    layers: int, kv_heads: int, positions: int, dim: int, dtype: type, filled: int, seeds: Sequence[int] = (1, 2)
) -> PagedLayers:
    """Return pages whose first `filled` positions are random; later positions are NaN, and the padding is zero."""
    made = PagedLayers(layers, kv_heads, positions, dim, dtype)
    for part, seed in enumerate(seeds):
        numbers = random(*made.shape, seed=seed)
        numbers[..., dim:] = 0
        numbers[:, :, filled:, :dim] = np.nan
        made.write(part, as_stored(numbers, dtype))
    return made

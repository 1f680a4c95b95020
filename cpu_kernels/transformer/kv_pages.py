"""Keys and values in pages, as the attention kernels read and write them.

A page holds the keys and values of 256 consecutive positions of a sequence, for all layers and heads. Sequences may
share pages, so a kernel finds a page by its address in the sequence's row of the page table.

Keys lie in panels of 32 positions, so that the scores of neighbouring positions are neighbouring lanes, and values in
panels of 32 dimensions, so that both are read in the order of the memory. A head's dimensions are padded with zeros to
a multiple of 32. A page is one array of `layers * kv_heads` heads of keys, then as many of values:

    keys    [layers, kv_heads, 256 / 32, padded_dim, 32]
    values  [layers, kv_heads, padded_dim / 32, 256, 32]
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from cpu_kernels.simd.vectors import FLOAT, I16
from cpu_kernels.transformer.attention_tile import PANEL, emit_narrow, stored_element

PAGE = 256  # positions


class KeyValues(NamedTuple):
    """The pages of all sequences and the rotation of every position."""

    table: np.ndarray  # int64 [sequences, pages of a sequence]: addresses of pages
    element: np.ndarray  # uint16 (the bits of float16) or float32 [1]: its type is that of keys and values
    layers: int
    kv_heads: int
    padded_dim: int
    cosines: np.ndarray  # float32 [rotations, positions, head_dim / 2]
    sines: np.ndarray  # float32 [rotations, positions, head_dim / 2]


def padded_dimension(head_dim: int) -> int:
    """Return the length of a head in a page."""
    return -(-head_dim // PANEL) * PANEL


def page_elements(layers: int, kv_heads: int, head_dim: int) -> int:
    """Return how many numbers a page holds."""
    return 2 * layers * kv_heads * PAGE * padded_dimension(head_dim)


@intrinsic
def store_narrowed(typing_context, element, address, value):
    """Emit the store of a float32 at an address, narrowed to what an array of `element`'s type holds."""

    def generate(context, builder, signature, arguments):
        _, address, value = arguments
        stored = stored_element(element)
        pointer = builder.inttoptr(address, (FLOAT if stored is FLOAT else I16).as_pointer())
        builder.store(emit_narrow(builder, stored, value), pointer)
        return context.get_dummy_value()

    return types.void(element, types.intp, types.float32), generate


@numba.njit(cache=True)
def keys_address(kv, sequence, layer, head, position):
    """Return where a head's keys of the page around `position` begin."""
    start = (layer * kv.kv_heads + head) * PAGE * kv.padded_dim * kv.element.itemsize
    return kv.table[sequence, position // PAGE] + start


@numba.njit(cache=True)
def values_address(kv, sequence, layer, head, position):
    """Return where a head's values of the page around `position` begin."""
    start = ((kv.layers + layer) * kv.kv_heads + head) * PAGE * kv.padded_dim * kv.element.itemsize
    return kv.table[sequence, position // PAGE] + start


@numba.njit(cache=True)
def store_head(kv, sequence, layer, head, position, key, value):
    """Store one head's key and value, float32 [head_dim] each, at a position of a sequence."""
    size, place = kv.element.itemsize, position % PAGE
    panel = keys_address(kv, sequence, layer, head, position) + place // PANEL * PANEL * kv.padded_dim * size
    for k in range(len(key)):
        store_narrowed(kv.element, panel + (k * PANEL + place % PANEL) * size, key[k])
    values = values_address(kv, sequence, layer, head, position)
    for k in range(len(value)):
        store_narrowed(kv.element, values + ((k // PANEL * PAGE + place) * PANEL + k % PANEL) * size, value[k])

"""The paged KV cache: the memory layout of its pages, and the storing of keys and values.

A page has the keys and values of 256 consecutive positions of a sequence, for all layers and heads. Sequences may
share pages: each sequence has a row of page addresses in the page table.

Keys are stored in panels of 32 positions, so that the scores of neighbouring positions are neighbouring lanes, and
values in panels of 32 dimensions. The attention kernels read both sequentially. A head's dimensions are padded with
zeros to a multiple of 32. A page is one array of `layers * kv_heads` heads of keys, then as many heads of values:

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
    """The page table of all sequences, and the rotation tables."""

    table: np.ndarray  # int64 [sequences, pages of a sequence]: addresses of pages
    element: np.ndarray  # [1], uint16 (the bits of float16) or float32: only its dtype is used, that of keys and values
    layers: int
    kv_heads: int
    padded_dim: int
    cosines: np.ndarray  # float32 [rotations, positions, head_dim / 2]
    sines: np.ndarray  # float32 [rotations, positions, head_dim / 2]


def padded_dimension(head_dim: int) -> int:
    """Return the padded length of a head in a page."""
    return -(-head_dim // PANEL) * PANEL


def page_elements(layers: int, kv_heads: int, head_dim: int) -> int:
    """Return the number of elements of a page."""
    return 2 * layers * kv_heads * PAGE * padded_dimension(head_dim)


@intrinsic
def store_narrowed(typing_context, element, address, value):
    """Emit the store of a float32 at an address, converted to the element type of the array `element`."""

    def generate(context, builder, signature, arguments):
        _, address, value = arguments
        stored = stored_element(element)
        pointer = builder.inttoptr(address, (FLOAT if stored is FLOAT else I16).as_pointer())
        builder.store(emit_narrow(builder, stored, value), pointer)
        return context.get_dummy_value()

    return types.void(element, types.intp, types.float32), generate


@numba.njit(cache=True)
def keys_address(kv, sequence, layer, head, position):
    """Return the address of a head's keys in the page of `position`."""
    start = (layer * kv.kv_heads + head) * PAGE * kv.padded_dim * kv.element.itemsize
    return kv.table[sequence, position // PAGE] + start


@numba.njit(cache=True)
def values_address(kv, sequence, layer, head, position):
    """Return the address of a head's values in the page of `position`."""
    start = ((kv.layers + layer) * kv.kv_heads + head) * PAGE * kv.padded_dim * kv.element.itemsize
    return kv.table[sequence, position // PAGE] + start


@numba.njit(cache=True)
def store_head(kv, sequence, layer, head, position, key, value):
    """Store one head's key and value, float32 [head_dim] each, at a position of a sequence."""
    size, row = kv.element.itemsize, position % PAGE
    panel = keys_address(kv, sequence, layer, head, position) + row // PANEL * PANEL * kv.padded_dim * size
    for k in range(len(key)):
        store_narrowed(kv.element, panel + (k * PANEL + row % PANEL) * size, key[k])
    values = values_address(kv, sequence, layer, head, position)
    for k in range(len(value)):
        store_narrowed(kv.element, values + ((k // PANEL * PAGE + row) * PANEL + k % PANEL) * size, value[k])

"""The paged KV cache: the memory layout of its pages, and the storing of keys and values.

A page has the keys and values of 256 consecutive positions of a sequence, for all layers and heads. Sequences may
share pages: each sequence has a row of page addresses in the page table.

Keys are stored in panels of 32 positions, so that the scores of neighbouring positions are neighbouring lanes, and
values in panels of 32 dimensions. The attention kernels read both sequentially. A head's dimensions are padded with
zeros to a multiple of 32. A page is one array of `layers * kv_heads` heads of keys, then as many heads of values:

    keys    [layers, kv_heads, 256 / 32, padded_dim, 32]
    values  [layers, kv_heads, padded_dim / 32, 256, 32]

With int8 (q8_0), float16 scales follow in the order of these numbers, one for 32 dimensions of a position:

    keys    [layers, kv_heads, 256 / 32, padded_dim / 32, 32 positions]
    values  [layers, kv_heads, padded_dim / 32, 256]

`layers` are those with attention. A layer with a short convolution needs the inputs of the last positions alone. A page
has them, float32, for the last 32 of its positions that were written, position p at place p % 32. So a sequence can be
cut within these positions and at the end of every page, and go on:

    inputs  [layers with a convolution, 32, width]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import intrinsic, overload, types
from cpu_kernels.simd.vectors import FLOAT, HALF, I8, I16
from cpu_kernels.transformer.attention_tile import PANEL, SCALE_BYTES, emit_narrow, stored_element

PAGE = 256  # positions
RECENT = 32  # last positions of a page whose inputs of convolutions are kept
_ALIGNMENT = 64  # bytes
_LARGEST = np.float32(127)  # of int8


class KeyValues(NamedTuple):
    """The page table of all sequences, and the rotation tables."""

    table: np.ndarray  # int64 [sequences, pages of a sequence]: addresses of pages
    element: (
        np.ndarray
    )  # [1], uint16 (the bits of float16), float32 or int8: only its dtype is used, that of keys and values
    layers: int  # with attention
    kv_heads: int
    padded_dim: int
    cosines: np.ndarray  # float32 [rotations, positions, head_dim / 2]
    sines: np.ndarray  # float32 [rotations, positions, head_dim / 2]
    slots: np.ndarray  # int64 [layers of the model]: the place of a layer among those of its kind
    recent_start: int  # where inputs of convolutions begin in a page, in bytes
    recent_width: int  # float32 numbers of one position; 0 if no layer has a convolution
    states: np.ndarray  # float32 [states, layers with a state, numbers], see `delta_net`; [0, 0, 0] for none
    state_of: np.ndarray  # int64 [sequences]: the state of each
    marks: np.ndarray  # int64 [sequences, marks]: after so many tokens a sequence's state is copied; 0 for never
    mark_states: np.ndarray  # int64 [sequences, marks]: what it is copied to


def padded_dimension(head_dim: int) -> int:
    """Return the padded length of a head in a page."""
    return -(-head_dim // PANEL) * PANEL


def page_elements(layers: int, kv_heads: int, head_dim: int, element: np.dtype[Any], recent: int = 0) -> int:
    """Return the size of a page in elements of this type, the scales of int8 included.

    `layers` are those with attention; `recent` is the number of inputs of convolutions at one position, in all layers.
    """
    start = recent_start(layers, kv_heads, head_dim, element)
    if not recent:
        return _key_value_bytes(layers, kv_heads, head_dim, element) // element.itemsize
    return (start + RECENT * recent * np.dtype(np.float32).itemsize) // element.itemsize


def recent_start(layers: int, kv_heads: int, head_dim: int, element: np.dtype[Any]) -> int:
    """Return where the inputs of convolutions begin in a page, in bytes."""
    return -(-_key_value_bytes(layers, kv_heads, head_dim, element) // _ALIGNMENT) * _ALIGNMENT


def _key_value_bytes(layers: int, kv_heads: int, head_dim: int, element: np.dtype[Any]) -> int:
    numbers = 2 * layers * kv_heads * PAGE * padded_dimension(head_dim)
    return numbers * element.itemsize + (numbers // PANEL * SCALE_BYTES if element == np.int8 else 0)


@intrinsic
def store_narrowed(typing_context, element, address, value):
    """Emit the store of a float32 at an address, converted to the element type of the array `element`."""

    def generate(context, builder, signature, arguments):
        _, address, value = arguments
        stored = stored_element(element)
        if stored is I8:
            raise TypeError("int8 needs a scale: store_scaled")
        pointer = builder.inttoptr(address, (FLOAT if stored is FLOAT else I16).as_pointer())
        builder.store(emit_narrow(builder, stored, value), pointer)
        return context.get_dummy_value()

    return types.void(element, types.intp, types.float32), generate


@numba.njit(cache=True)
def keys_address(kv, sequence, layer, head, position):
    """Return the address of a head's keys in the page of `position`."""
    start = (kv.slots[layer] * kv.kv_heads + head) * PAGE * kv.padded_dim * kv.element.itemsize
    return kv.table[sequence, position // PAGE] + start


@numba.njit(cache=True)
def values_address(kv, sequence, layer, head, position):
    """Return the address of a head's values in the page of `position`."""
    start = ((kv.layers + kv.slots[layer]) * kv.kv_heads + head) * PAGE * kv.padded_dim * kv.element.itemsize
    return kv.table[sequence, position // PAGE] + start


@intrinsic
def _store_half(typing_context, address, value):
    """Emit the store of a float32 as float16; return what was stored, as float32."""

    def generate(context, builder, signature, arguments):
        address, value = arguments
        half = emit_narrow(builder, HALF, value)
        builder.store(half, builder.inttoptr(address, I16.as_pointer()))
        return builder.fpext(builder.bitcast(half, HALF), FLOAT)

    return types.float32(types.intp, types.float32), generate


@intrinsic
def _store_byte(typing_context, address, value):
    """Emit the store of a float32 that is a whole number of int8."""

    def generate(context, builder, signature, arguments):
        address, value = arguments
        builder.store(builder.fptosi(value, I8), builder.inttoptr(address, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), generate


@numba.njit(cache=True)
def scales_address(kv, page, address):
    """Return the address of the scale of the 32 numbers at an address in a page; of keys, of the first position's."""
    numbers = 2 * kv.layers * kv.kv_heads * PAGE * kv.padded_dim
    return page + numbers + (address - page) // PANEL * SCALE_BYTES


@numba.njit(cache=True)
def _store_scaled(vector, first, address, stride, scale_address):
    """Store 32 numbers of a vector from `first` on, zeros behind its end, as int8; the scale is float16.

    A number that is no number makes the scale none either.
    """
    largest, bad, last = np.float32(0), False, min(len(vector), first + PANEL)
    for k in range(first, last):
        largest = max(largest, abs(vector[k]))
        bad = bad or vector[k] != vector[k]
    scale = _store_half(scale_address, np.float32(np.nan) if bad else largest / _LARGEST)
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    for k in range(first, first + PANEL):
        number = np.rint(vector[k] * inverse) if k < last and not bad else np.float32(0)
        _store_byte(address + (k - first) * stride, max(-_LARGEST, min(_LARGEST, number)))


@numba.njit(cache=True)
def _store_scaled_head(kv, page, keys, values, row, key, value):
    """Store one head's key and value as int8; `row` is the position in the page."""
    for first in range(0, kv.padded_dim, PANEL):
        block = keys + row // PANEL * PANEL * kv.padded_dim + first * PANEL
        scale = scales_address(kv, page, block) + row % PANEL * SCALE_BYTES
        _store_scaled(key, first, block + row % PANEL, PANEL, scale)
        block = values + (first // PANEL * PAGE + row) * PANEL
        _store_scaled(value, first, block, 1, scales_address(kv, page, block))


@numba.njit(cache=True)
def _store_narrowed_head(kv, keys, values, row, key, value):
    """Store one head's key and value as floating-point numbers; `row` is the position in the page."""
    size = kv.element.itemsize
    panel = keys + row // PANEL * PANEL * kv.padded_dim * size
    for k in range(len(key)):
        store_narrowed(kv.element, panel + (k * PANEL + row % PANEL) * size, key[k])
    for k in range(len(value)):
        store_narrowed(kv.element, values + ((k // PANEL * PAGE + row) * PANEL + k % PANEL) * size, value[k])


def _store_at(kv, page, keys, values, row, key, value):
    """Store one head's key and value in the element type of `kv`, which is chosen when this is compiled."""


@overload(_store_at)
def _choose_store(kv, page, keys, values, row, key, value):
    if stored_element(kv.types[KeyValues._fields.index("element")]) is I8:
        return lambda kv, page, keys, values, row, key, value: _store_scaled_head(
            kv, page, keys, values, row, key, value
        )
    return lambda kv, page, keys, values, row, key, value: _store_narrowed_head(kv, keys, values, row, key, value)


@numba.njit(cache=True)
def store_head(kv, sequence, layer, head, position, key, value):
    """Store one head's key and value, float32 [head_dim] each, at a position of a sequence."""
    keys = keys_address(kv, sequence, layer, head, position)
    values = values_address(kv, sequence, layer, head, position)
    _store_at(kv, kv.table[sequence, position // PAGE], keys, values, position % PAGE, key, value)

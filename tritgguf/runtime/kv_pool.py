"""Keys and values of many sequences, and inputs of convolutions, in pages that sequences may share.

A page holds 256 positions. A sequence's row of the page table names its pages; a page that several sequences or the
prefix cache hold is counted, and copied before one of them writes to it. Pages are allocated when they are first
needed: a context of 8,192 tokens takes 190 MB even for a model of 135M parameters, and what is never written should
neither be reserved nor cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpu_kernels.transformer.aligned import aligned_zeros
from cpu_kernels.transformer.attention_tile import PANEL
from cpu_kernels.transformer.kv_pages import (
    PAGE,
    RECENT,
    KeyValues,
    padded_dimension,
    page_elements,
    recent_start,
)
from tritgguf.errors import BadRequestError
from tritgguf.machine import machine_memory_bytes
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.rotations import RotationTables
from tritgguf.runtime.state_pool import StatePool

# As llama.cpp names them. Kernels take float16 as its bits.
CACHE_TYPES: dict[str, np.dtype[Any]] = {
    "f16": np.dtype(np.uint16),
    "f32": np.dtype(np.float32),
    "q8_0": np.dtype(np.int8),
}
DEFAULT_CACHE_TYPE = "f16"
_NO_PAGE = -1
_SHARE_OF_FREE_MEMORY = 0.25
_SHARE_OF_COPIES = 0.1  # of the free memory, for copies of states
_MOST_COPIES = 64


class PoolExhaustedError(Exception):
    """There are not enough free pages, or no free sequence; nothing was changed."""


def pages_of(tokens: int) -> int:
    """Return how many pages so many tokens take."""
    return -(-tokens // PAGE)


def page_bytes(config: ModelConfig, cache_type: str = DEFAULT_CACHE_TYPE) -> int:
    """Return the bytes of a page."""
    element = CACHE_TYPES[cache_type]
    return _page_elements(config, element) * element.itemsize


def _page_elements(config: ModelConfig, element: np.dtype[Any]) -> int:
    sizes = config.dimensions
    convolutions = 0 if sizes.convolutions is None else len(sizes.convolutions.layers)
    return page_elements(config.attention_layers, sizes.kv_heads, sizes.head_dim, element, convolutions * sizes.hidden)


def most_cut(config: ModelConfig) -> int | None:
    """Return how many of its last tokens a sequence can forget and go on; None for all."""
    if config.dimensions.delta_net is not None:
        return 0
    convolutions = config.dimensions.convolutions
    return None if convolutions is None else RECENT - (convolutions.taps - 1)


def check_cache_type(cache_type: str) -> None:
    """Raise BadRequestError for a type that is not a key of CACHE_TYPES."""
    if cache_type not in CACHE_TYPES:
        raise BadRequestError(f"a cache cannot hold {cache_type}; choose from {', '.join(CACHE_TYPES)}")


def check_cache_fits(config: ModelConfig, context: int, cache_type: str, where: str) -> None:
    """Raise TritGgufError when keys and values of this context need more memory than the machine has free."""
    memory, needed = machine_memory_bytes(), pages_of(context) * page_bytes(config, cache_type) + state_bytes(config)
    if memory is not None and needed > memory[1]:
        raise BadRequestError(
            f"{where}: a context of {context} tokens needs {needed:,} bytes of memory, of which {memory[1]:,} are free;"
            " use a smaller one (--ctx-size, context=)"
        )


def state_bytes(config: ModelConfig) -> int:
    """Return the bytes of a sequence's state; 0 for a model without layers that have one."""
    layers, numbers = config.state_shape
    return layers * numbers * np.dtype(np.float32).itemsize


def copies_for(config: ModelConfig) -> int:
    """Return how many copies of states a pool may keep, as memory allows."""
    n_bytes, memory = state_bytes(config), machine_memory_bytes()
    if not n_bytes or memory is None:
        return _MOST_COPIES if n_bytes else 0
    return min(_MOST_COPIES, max(2, int(_SHARE_OF_COPIES * memory[1] / n_bytes)))


def pages_for(config: ModelConfig, context: int, sequences: int, cache_type: str = DEFAULT_CACHE_TYPE) -> int:
    """Return how many pages a pool should have: for all sequences at once, as far as memory allows.

    A quarter of the free memory is allowed, but one sequence always fits. With a page besides for each sequence, one
    that it shares can be copied. Pages that nobody needs at the moment keep the prefixes of earlier requests.
    """
    for_one, memory = pages_of(context) + 1, machine_memory_bytes()
    allowed = for_one if memory is None else _SHARE_OF_FREE_MEMORY * memory[1] / page_bytes(config, cache_type)
    return max(for_one, min(sequences * for_one, int(allowed)))


class KVPool:
    """Pages and the sequences that hold them. One thread at a time may use it.

    Attributes:
        table: int64 [sequences, pages of a sequence], the addresses of the pages; 0 where there is none.
        element: [1] of the type of keys and values.
        lengths: int64 [sequences], tokens whose keys and values are stored.
        references: int32 [pages], how many sequences and other owners hold a page; 0 for a free one.
        most_cut: how many of its last tokens a sequence can always forget and go on; None for all.
        states: the states of sequences; None for a model without layers that have one.

    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        pages: int,
        sequences: int,
        context: int,
        cache_type: str = DEFAULT_CACHE_TYPE,
        copies: int | None = None,
    ) -> None:
        """Make room for `pages` pages and `sequences` sequences of at most `context` tokens each.

        `cache_type` is a key of CACHE_TYPES, `copies` is how many copies of states there may be, None for
        `copies_for`. Raises TritGgufError for an unknown type.
        """
        check_cache_type(cache_type)
        sizes = config.dimensions
        self.context = context
        self.layers, self.kv_heads = config.attention_layers, sizes.kv_heads
        self.padded_dim = padded_dimension(sizes.head_dim)
        self.element = np.zeros(1, CACHE_TYPES[cache_type])
        self._slots = config.slots
        self._recent_start = recent_start(self.layers, sizes.kv_heads, sizes.head_dim, self.element.dtype)
        self._recent_width = 0 if sizes.convolutions is None else sizes.hidden
        self.most_cut = most_cut(config)
        self._needed = 0 if self.most_cut is None else RECENT - self.most_cut  # positions that a convolution sees
        of_copies = copies_for(config) if copies is None else copies
        self._states = StatePool(config.state_shape, sequences, of_copies)
        self.states = self._states if config.state_shape[0] else None
        self.table = np.zeros((sequences, pages_of(context)), np.int64)
        self.lengths = np.zeros(sequences, np.int64)
        self.references = np.zeros(pages, np.int32)
        self._elements = _page_elements(config, self.element.dtype)
        self._pages = np.full(self.table.shape, _NO_PAGE, np.int32)
        self._held = np.zeros(sequences, np.int64)  # pages of each sequence
        self._written = np.zeros(pages, np.int64)  # positions of each page that were written, cut off or not
        self._storage: dict[int, np.ndarray] = {}
        self._free_pages = list(range(pages - 1, -1, -1))
        self._free_sequences = list(range(sequences - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """How many pages nobody holds."""
        return len(self._free_pages)

    @property
    def free_sequences(self) -> int:
        """How many more sequences there may be."""
        return len(self._free_sequences)

    def allocate(self, pages: Sequence[int] = (), length: int = 0, state: int | None = None) -> int:
        """Return a new sequence that begins with the first `length` tokens stored in some pages, which it shares.

        `state` is a copy of the state after these tokens, in a model that has states. Raises PoolExhaustedError when
        there are as many sequences as there may be, and ValueError when the pages are too few, one of them is free, or
        the state is missing.
        """
        shared = pages[: pages_of(length)]
        if len(shared) < pages_of(length) or any(self.references[page] <= 0 for page in shared):
            raise ValueError("a sequence can only begin with pages that are in use and hold all its tokens")
        if self.states is not None and bool(length) != (state is not None):
            raise ValueError("a sequence can only begin with tokens whose state is there")
        if not self._free_sequences:
            raise PoolExhaustedError
        sequence = self._free_sequences.pop()
        self.lengths[sequence] = length
        for place, page in enumerate(shared):
            self._hold(sequence, place, page)
        if self.states is not None:
            self.states.start(sequence, state)
        return sequence

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence from `length` on; ValueError where it cannot go on (see `resumable`)."""
        if not 0 <= length <= self.lengths[sequence] or self.resumable_after(sequence, length) < length:
            raise ValueError("a sequence can only be cut within what it holds")
        if self.states is not None and not length:
            self.states.clear(sequence)
        self._drop_pages(sequence, pages_of(length))
        self.lengths[sequence] = length

    def resumable_after(self, sequence: int, length: int) -> int:
        """Return after how many tokens, at most `length`, a sequence can go on: with a state, after all or none."""
        if self.states is None:
            return self.resumable(self.pages(sequence), length)
        return length if length == self.lengths[sequence] else 0

    def resumable(self, pages: Sequence[int], length: int) -> int:
        """Return after how many tokens, at most `length`, a sequence can go on that these pages hold.

        Keys and values can be cut anywhere. Of the inputs of convolutions, a page has those of the last positions that
        were written: so a sequence can be cut within these and at the borders of pages.
        """
        if self.most_cut is None or length <= 0:
            return max(0, length)
        border = (length - 1) // PAGE * PAGE
        kept = border + int(self._written[pages[border // PAGE]]) - RECENT
        return length if max(length - self._needed, border) >= kept else border

    def surely_resumable(self, length: int) -> int:
        """Return after how many tokens, at most `length`, a sequence can go on whatever follows in its pages."""
        return length if self.most_cut is None else length // PAGE * PAGE

    def free(self, sequence: int) -> None:
        """Forget a sequence."""
        if sequence in self._free_sequences:
            raise ValueError("the sequence is free already")
        self._drop_pages(sequence, 0)
        if self.states is not None:
            self.states.end(sequence)
        self.lengths[sequence] = 0
        self._free_sequences.append(sequence)

    def pages(self, sequence: int) -> list[int]:
        """Return a sequence's pages in order."""
        pages: list[int] = self._pages[sequence, : self._held[sequence]].tolist()
        return pages

    def missing_pages(self, sequence: int, tokens: int) -> int:
        """Return how many free pages `reserve` would take."""
        length, held = int(self.lengths[sequence]), int(self._held[sequence])
        return max(0, pages_of(length + tokens) - held) + int(self._shares_last_page(sequence, tokens))

    def reserve(self, sequence: int, tokens: int) -> None:
        """Make sure that a sequence can store so many more tokens in pages of its own.

        Raises PoolExhaustedError when too few pages are free, and ValueError beyond the context.
        """
        if self.lengths[sequence] + tokens > self.context:
            raise ValueError("a sequence cannot be longer than the context")
        if self.missing_pages(sequence, tokens) > self.free_pages:
            raise PoolExhaustedError
        if self._shares_last_page(sequence, tokens):
            self._copy_last_page(sequence)
        for place in range(self._held[sequence], pages_of(int(self.lengths[sequence]) + tokens)):
            self._set(sequence, place, self._take_page())
        self._note_written(sequence, tokens)

    def advance(self, sequence: int, tokens: int) -> None:
        """Note that the keys and values of so many more tokens are stored."""
        self.lengths[sequence] += tokens

    def retain(self, page: int) -> None:
        """Hold a page that is in use, besides the sequences that hold it."""
        if self.references[page] <= 0:
            raise ValueError("a free page cannot be retained")
        self.references[page] += 1

    def release(self, page: int) -> None:
        """Let go of a page that was retained."""
        if self.references[page] <= 0:
            raise ValueError("the page is free already")
        self.references[page] -= 1
        if not self.references[page]:
            self._free_pages.append(page)

    def writable(self, sequences: np.ndarray, positions: np.ndarray) -> bool:
        """Tell whether all positions, int64 [n] of sequences int64 [n], lie in pages that no one else holds."""
        pages = self._pages[sequences, positions // PAGE]
        return bool((pages != _NO_PAGE).all() and (self.references[pages] == 1).all())

    def key_values(self, rotations: RotationTables) -> KeyValues:
        """Return what the kernels take: addresses, which are valid as long as the pool and the tables are."""
        return KeyValues(
            self.table, self.element, self.layers, self.kv_heads, self.padded_dim, rotations.cosines, rotations.sines,
            self._slots, self._recent_start, self._recent_width, self._states.numbers, self._states.of_sequences,
            self._states.marks, self._states.mark_states,
        )  # fmt: skip

    def clear_pages(self) -> None:
        """Write zeros to all pages that are in use."""
        for page in self._storage.values():
            page.fill(0)

    def check(self, retained: Sequence[int] = ()) -> None:
        """Raise AssertionError unless every page is free or counted once for each holder; `retained`: others' pages."""
        held = [*self._pages[self._pages != _NO_PAGE].tolist(), *retained]
        counts = np.bincount(np.array(held, np.int64), minlength=len(self.references))
        assert (counts == self.references).all(), "pages are not counted right"
        assert sorted(self._free_pages) == np.flatnonzero(self.references == 0).tolist(), "the free list is wrong"
        assert len(set(self._free_sequences)) == len(self._free_sequences), "a sequence is free twice"
        assert not self.table[self._pages == _NO_PAGE].any(), "an address of a page that is not held"

    def _shares_last_page(self, sequence: int, tokens: int) -> bool:
        """Tell whether writing would change a page that others hold too."""
        length = int(self.lengths[sequence])
        if not tokens or length % PAGE == 0:
            return False
        return bool(self.references[self._pages[sequence, length // PAGE]] > 1)

    def _copy_last_page(self, sequence: int) -> None:
        place, positions = divmod(int(self.lengths[sequence]), PAGE)
        shared, own = int(self._pages[sequence, place]), self._take_page()
        self._copy(shared, own, positions)
        self._written[own] = self._written[shared]
        self._set(sequence, place, own)
        self.release(shared)

    def _copy(self, page: int, copy: int, positions: int) -> None:
        """Copy the first positions of a page; a whole one has megabytes, of which a short text fills little."""
        source, target = self._storage[page], self._storage[copy]
        heads, panels = self.layers * self.kv_heads, -(-positions // PANEL)
        numbers = heads * PAGE * self.padded_dim
        keys, values = (heads, PAGE // PANEL, -1), (heads * self.padded_dim // PANEL, PAGE, PANEL)
        for first, shape, count in ((0, keys, panels), (numbers, values, positions)):
            part = slice(first, first + numbers)
            target[part].reshape(shape)[:, :count] = source[part].reshape(shape)[:, :count]
        target[2 * numbers :] = source[2 * numbers :]  # scales, and inputs of convolutions

    def _note_written(self, sequence: int, tokens: int) -> None:
        """Note that a sequence is about to write so many more positions."""
        length = int(self.lengths[sequence])
        for place in range(length // PAGE, pages_of(length + tokens)):
            page = self._pages[sequence, place]
            self._written[page] = max(self._written[page], min(length + tokens - place * PAGE, PAGE))

    def _take_page(self) -> int:
        page = self._free_pages[-1]
        if page not in self._storage:
            self._storage[page] = aligned_zeros((self._elements,), self.element.dtype)
        self._free_pages.pop()  # not before: there may be no memory for it
        self.references[page] = 1
        self._written[page] = 0
        return page

    def _hold(self, sequence: int, place: int, page: int) -> None:
        self.retain(page)
        self._set(sequence, place, page)

    def _set(self, sequence: int, place: int, page: int) -> None:
        self._pages[sequence, place] = page
        self._held[sequence] = max(self._held[sequence], place + 1)
        self.table[sequence, place] = self._storage[page].ctypes.data

    def _drop_pages(self, sequence: int, first: int) -> None:
        """Let go of a sequence's pages from place `first` on."""
        for page in self.pages(sequence)[first:]:
            self.release(page)
        self._pages[sequence, first:] = _NO_PAGE
        self.table[sequence, first:] = 0
        self._held[sequence] = min(self._held[sequence], first)

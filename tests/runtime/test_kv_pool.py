"""Pages of keys and values: counted right, never changed under anybody else, and refused where they are misused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pool_config import pool_config

from cpu_kernels.transformer.kv_pages import PAGE, RECENT
from tritgguf.errors import BadRequestError
from tritgguf.runtime.kv_pool import KVPool, PoolExhaustedError, pages_of

WIDTH, TAPS = 16, 4  # of a convolution
CONFIG, WITH_CONVOLUTION = pool_config(2), pool_config(2, hidden=WIDTH, taps=TAPS)
PAGES, SEQUENCES, CONTEXT = 7, 4, 3 * PAGE - 10
LENGTHS = st.one_of(st.integers(0, CONTEXT + 20), st.sampled_from([1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE]))


def new_pool(pages: int = PAGES, sequences: int = SEQUENCES, config: Any = CONFIG, **options: Any) -> KVPool:
    return KVPool(config, pages=pages, sequences=sequences, context=CONTEXT, **options)


def numbers_at(address: int) -> np.ndarray:
    """Return the numbers of a page, one for each position, as a kernel would find them."""
    return np.ctypeslib.as_array((ctypes.c_uint16 * PAGE).from_address(address))


def first_numbers(addresses: list[int], count: int) -> list[int]:
    numbers: list[int] = np.concatenate([*map(numbers_at, addresses), np.zeros(0, np.uint16)])[:count].tolist()
    return numbers


def stored(pool: KVPool, sequence: int) -> list[int]:
    """Return the number at each position of a sequence."""
    length = int(pool.lengths[sequence])
    return first_numbers(pool.table[sequence, : pages_of(length)].tolist(), length)


def input_at(pool: KVPool, sequence: int, position: int) -> np.ndarray:
    """Return the input of a convolution at a position, as a kernel would find it."""
    place = int(pool.table[sequence, position // PAGE]) + pool._recent_start
    return np.ctypeslib.as_array((ctypes.c_float * RECENT * WIDTH).from_address(place)).reshape(RECENT, WIDTH)[
        position % RECENT
    ]


def append(pool: KVPool, sequence: int, numbers: list[int]) -> None:
    pool.reserve(sequence, len(numbers))
    start = int(pool.lengths[sequence])
    positions = np.arange(start, start + len(numbers))
    assert pool.writable(np.full(len(numbers), sequence), positions)
    for position, number in zip(positions.tolist(), numbers, strict=True):
        numbers_at(int(pool.table[sequence, position // PAGE]))[position % PAGE] = number
        if pool.most_cut is not None:
            input_at(pool, sequence, position)[0] = number
    pool.advance(sequence, len(numbers))


def state_of(pool: KVPool) -> list[Any]:
    arrays = (pool.table, pool.lengths, pool.references)
    return [*(array.tolist() for array in arrays), pool.free_pages, pool.free_sequences]


@dataclass
class Owner:
    """Somebody besides the sequences who holds pages, as the cache of prefixes does."""

    pages: list[int]
    numbers: list[int]


class PoolMachine(RuleBasedStateMachine):
    """Any order of everything that can be done with a pool, beside the numbers that should be in it."""

    config = CONFIG

    def __init__(self) -> None:
        super().__init__()
        self.pool = new_pool(config=self.config)
        self.sequences: dict[int, list[int]] = {}
        self.owners: list[Owner] = []
        self.last_number = 0

    def new_numbers(self, count: int) -> list[int]:
        first = self.last_number + 1
        self.last_number += count
        return [number % 65536 for number in range(first, first + count)]

    def any_sequence(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.sequences)))

    def unless_full(self, change: Callable[[], Any]) -> Any:
        """Do something; return None where the pool has no room for it, which then must not change anything."""
        before = state_of(self.pool)
        try:
            return change()
        except PoolExhaustedError:
            assert state_of(self.pool) == before
            return None

    @rule()
    def allocate(self) -> None:
        free = self.pool.free_sequences
        sequence = self.unless_full(self.pool.allocate)
        assert (sequence is None) == (not free)
        if sequence is not None:
            assert sequence not in self.sequences
            self.sequences[sequence] = []

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), length=LENGTHS)
    def share_an_owners_pages(self, data: st.DataObject, length: int) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        length = self.pool.resumable(owner.pages, min(length, len(owner.numbers)))
        sequence = self.unless_full(lambda: self.pool.allocate(owner.pages, length))
        if sequence is not None:
            self.sequences[sequence] = owner.numbers[:length]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), length=LENGTHS)
    def share_a_sequences_pages(self, data: st.DataObject, length: int) -> None:
        source = self.any_sequence(data)
        length = self.pool.resumable(self.pool.pages(source), min(length, len(self.sequences[source])))
        sequence = self.unless_full(lambda: self.pool.allocate(self.pool.pages(source), length))
        if sequence is not None:
            self.sequences[sequence] = self.sequences[source][:length]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=LENGTHS)
    def reserve(self, data: st.DataObject, tokens: int) -> None:
        sequence = self.any_sequence(data)
        if len(self.sequences[sequence]) + tokens > CONTEXT:
            before = state_of(self.pool)
            with pytest.raises(ValueError, match="longer than the context"):
                self.pool.reserve(sequence, tokens)
            assert state_of(self.pool) == before
            return
        missing, free = self.pool.missing_pages(sequence, tokens), self.pool.free_pages
        self.unless_full(lambda: self.pool.reserve(sequence, tokens))
        assert self.pool.free_pages == (free if missing > free else free - missing)
        assert missing > free or self.pool.missing_pages(sequence, tokens) == 0

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=LENGTHS)
    def write(self, data: st.DataObject, tokens: int) -> None:
        sequence = self.any_sequence(data)
        numbers = self.new_numbers(min(tokens, CONTEXT - len(self.sequences[sequence])))
        missing, free = self.pool.missing_pages(sequence, len(numbers)), self.pool.free_pages
        self.unless_full(lambda: append(self.pool, sequence, numbers))
        if missing <= free:
            self.sequences[sequence] += numbers

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), length=LENGTHS)
    def truncate(self, data: st.DataObject, length: int) -> None:
        sequence = self.any_sequence(data)
        numbers = self.sequences[sequence]
        if length > len(numbers) or self.pool.resumable(self.pool.pages(sequence), length) < length:
            with pytest.raises(ValueError, match="only be cut within"):
                self.pool.truncate(sequence, length)
            return
        self.pool.truncate(sequence, length)
        del self.sequences[sequence][length:]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = self.any_sequence(data)
        self.pool.free(sequence)
        del self.sequences[sequence]
        with pytest.raises(ValueError, match="free already"):
            self.pool.free(sequence)

    @precondition(lambda self: any(self.sequences.values()))
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        sequence = self.any_sequence(data)
        numbers = list(self.sequences[sequence])
        pages = self.pool.pages(sequence)[: pages_of(len(numbers))]
        for page in pages:
            self.pool.retain(page)
        self.owners.append(Owner(pages, numbers))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        for page in owner.pages:
            self.pool.release(page)

    @precondition(lambda self: self.pool.free_pages)
    @rule(data=st.data())
    def misuse_a_free_page(self, data: st.DataObject) -> None:
        free = data.draw(st.sampled_from(np.flatnonzero(self.pool.references == 0).tolist()))
        before = state_of(self.pool)
        for misuse in (self.pool.retain, self.pool.release, lambda page: self.pool.allocate([page], 1)):
            with pytest.raises(ValueError, match=r"free|in use"):
                misuse(free)
        assert state_of(self.pool) == before

    @invariant()
    def every_page_is_counted(self) -> None:
        retained = [page for owner in self.owners for page in owner.pages]
        self.pool.check(retained)
        held = {page for sequence in self.sequences for page in self.pool.pages(sequence)} | set(retained)
        assert self.pool.free_pages == PAGES - len(held)
        assert self.pool.free_sequences == SEQUENCES - len(self.sequences)

    @invariant()
    def everybody_finds_what_was_written(self) -> None:
        for sequence, numbers in self.sequences.items():
            assert self.pool.lengths[sequence] == len(numbers)
            assert stored(self.pool, sequence) == numbers
        for owner in self.owners:
            addresses = [self.pool._storage[page].ctypes.data for page in owner.pages]
            assert first_numbers(addresses, len(owner.numbers)) == owner.numbers


class ConvolutionMachine(PoolMachine):
    """The same of a model with a short convolution; every sequence can go on, wherever it was cut."""

    config = WITH_CONVOLUTION

    @invariant()
    def every_sequence_has_the_inputs_that_come_next(self) -> None:
        for sequence, numbers in self.sequences.items():
            for position in range(max(0, len(numbers) - TAPS + 1), len(numbers)):
                assert input_at(self.pool, sequence, position)[0] == numbers[position]


TestPool, TestPoolWithConvolution = PoolMachine.TestCase, ConvolutionMachine.TestCase
TestPool.settings = TestPoolWithConvolution.settings = settings(stateful_step_count=40)


# -- one thing at a time


def test_writing_copies_a_shared_page_once() -> None:
    pool = new_pool()
    first = pool.allocate()
    append(pool, first, list(range(1, 301)))
    second = pool.allocate(pool.pages(first), 280)
    assert pool.pages(second) == pool.pages(first)
    assert pool.free_pages == PAGES - 2
    append(pool, second, [7000])
    assert stored(pool, second) == [*range(1, 281), 7000]
    assert stored(pool, first) == list(range(1, 301))
    assert pool.free_pages == PAGES - 3
    append(pool, first, [8000])  # its page is its own by now
    assert pool.free_pages == PAGES - 3
    assert pool.pages(first)[0] == pool.pages(second)[0]
    pool.check()


def parts_of(page: np.ndarray, length: int) -> list[np.ndarray]:
    """Return the keys and values of a page's first positions, of 6 heads of 64 numbers, and what follows them."""
    keys, values, others = np.split(page, [6 * PAGE * 64, 12 * PAGE * 64])
    by_position = keys.reshape(6, 8, 64, 32).swapaxes(2, 3).reshape(6, PAGE, 64)
    return [by_position[:, :length], values.reshape(6, 2, PAGE, 32)[:, :, :length], others]


@pytest.mark.parametrize("cache_type", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 200, 255])
def test_a_copy_has_the_keys_values_and_scales_of_its_positions(cache_type: str, length: int) -> None:
    config = pool_config(40, layers=2, kv_heads=3, taps=3)
    pool = KVPool(config, pages=2, sequences=2, context=PAGE, cache_type=cache_type)
    first = pool.allocate()
    pool.reserve(first, PAGE)
    pool.advance(first, PAGE)
    content = pool._storage[pool.pages(first)[0]]
    content[:] = np.random.default_rng(length).integers(-100, 100, len(content))
    second = pool.allocate(pool.pages(first), length)
    pool.reserve(second, 1)
    copy = pool._storage[pool.pages(second)[0]]
    for found, expected in zip(parts_of(copy, length), parts_of(content, length), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(copy, content)


def test_a_freed_page_is_used_again() -> None:
    pool = new_pool(pages=1, sequences=2)
    first, second = pool.allocate(), pool.allocate()
    append(pool, first, [1, 2, 3])
    page, address = pool.pages(first), int(pool.table[first, 0])
    with pytest.raises(PoolExhaustedError):
        pool.reserve(second, 1)
    pool.free(first)
    append(pool, second, [4])
    assert pool.pages(second) == page
    assert pool.table[second, 0] == address
    pool.check()


def test_a_page_reserved_ahead_does_not_hide_that_a_copy_needs_one() -> None:
    pool = new_pool(pages=2, sequences=2)
    first = pool.allocate()
    append(pool, first, [1])
    pool.reserve(first, PAGE)
    pool.allocate(pool.pages(first), 1)
    assert pool.missing_pages(first, 1) == 1
    with pytest.raises(PoolExhaustedError):
        pool.reserve(first, 1)
    pool.check()


def test_pages_must_hold_all_tokens_that_a_sequence_begins_with() -> None:
    pool = new_pool()
    first = pool.allocate()
    append(pool, first, [1] * PAGE)
    with pytest.raises(ValueError, match="hold all its tokens"):
        pool.allocate(pool.pages(first), PAGE + 1)
    pool.check()


def test_check_finds_a_page_that_is_counted_wrong() -> None:
    pool = new_pool()
    sequence = pool.allocate()
    append(pool, sequence, [1])
    with pytest.raises(AssertionError, match="not counted right"):
        pool.check(pool.pages(sequence))
    pool.retain(pool.pages(sequence)[0])
    with pytest.raises(AssertionError, match="not counted right"):
        pool.check()


def test_where_a_convolution_can_be_cut() -> None:
    """Within the last 32 positions that were written, less those that it sees, and at the borders of pages."""
    pool = new_pool(config=WITH_CONVOLUTION)
    sequence = pool.allocate()
    append(pool, sequence, [1] * 400)
    pages = pool.pages(sequence)
    expected = {400: 400, 371: 371, 370: 256, 257: 256, 256: 256, 227: 227, 226: 0, 1: 0, 0: 0}
    assert {length: pool.resumable(pages, length) for length in expected} == expected
    with pytest.raises(ValueError, match="only be cut within"):
        pool.truncate(sequence, 300)
    pool.truncate(sequence, 371)
    assert pool.resumable(pages, 370) == 256  # positions that were cut off have taken the place of others
    assert [pool.surely_resumable(length) for length in (255, 256, 600)] == [0, 256, 512]
    assert new_pool().resumable(pages, 300) == new_pool().surely_resumable(300) == 300


def test_an_unknown_cache_type() -> None:
    with pytest.raises(BadRequestError, match="a cache cannot hold q4_0; choose from f16, f32, q8_0"):
        new_pool(cache_type="q4_0")

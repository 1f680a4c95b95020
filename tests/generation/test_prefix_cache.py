"""The cache of prefixes beside a list of everything that was ever put into it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pool_config import pool_config

from cpu_kernels.transformer.kv_pages import PAGE
from tritgguf.generation.prefix_cache import Prefix, PrefixCache, common_length
from tritgguf.runtime.kv_pool import KVPool, pages_of

CONFIG = pool_config(2)
PAGES, SEQUENCES, CONTEXT = 40, 4, 4 * PAGE


class CachedPool:
    """A pool with a cache, where the keys of a token are its number."""

    def __init__(self, pages: int = PAGES) -> None:
        self.pool = KVPool(CONFIG, pages=pages, sequences=SEQUENCES, context=CONTEXT)
        self.cache = PrefixCache(self.pool)

    def start(self, tokens: list[int]) -> tuple[int, int]:
        """Return a sequence of some tokens, and how many of them were in the cache."""
        pages, length, *_ = self.cache.match(tokens)
        sequence = self.pool.allocate(pages, length)
        self.cache.evict(self.pool.missing_pages(sequence, len(tokens) - length) - self.pool.free_pages)
        self.pool.reserve(sequence, len(tokens) - length)
        for position in range(length, len(tokens)):
            self.numbers(self.pool.pages(sequence)[position // PAGE])[position % PAGE] = tokens[position]
        self.pool.advance(sequence, len(tokens) - length)
        return sequence, length

    def end(self, sequence: int, tokens: list[int]) -> None:
        self.cache.insert(tokens, self.pool.pages(sequence))
        self.pool.free(sequence)

    def put(self, tokens: list[int]) -> int:
        """Evaluate tokens, as a request does; return how many were in the cache."""
        sequence, length = self.start(tokens)
        self.end(sequence, tokens)
        return length

    def numbers(self, page: int) -> np.ndarray:
        return self.pool._storage[page][:PAGE]

    def stored(self, pages: list[int], length: int) -> list[int]:
        numbers: list[int] = np.concatenate([np.zeros(0), *map(self.numbers, pages)])[:length].astype(int).tolist()
        return numbers

    def held(self, tokens: list[int]) -> int:
        """Return how many tokens are in the cache, and check that their pages have their keys."""
        pages, length, *_ = self.cache.match(tokens)
        assert len(pages) == pages_of(length)
        assert self.stored(pages, length) == tokens[:length]
        return length

    def check(self) -> None:
        self.pool.check(self.cache.held_pages())


class CacheMachine(RuleBasedStateMachine):
    """Any order of insertions, look-ups and evictions; texts begin like one another, at any length."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = CachedPool()
        self.texts: list[list[int]] = [[]]
        self.inserted: list[list[int]] = []
        self.evicted = False
        self.running: dict[int, list[int]] = {}

    def new_text(self, data: st.DataObject) -> list[int]:
        """Return the beginning of an earlier text and something new, or nothing new."""
        text = data.draw(st.sampled_from(self.texts))
        cut = data.draw(st.one_of(st.integers(0, CONTEXT), st.sampled_from([PAGE - 1, PAGE, PAGE + 1, 2 * PAGE])))
        more = data.draw(st.one_of(st.integers(0, 2 * PAGE), st.just(PAGE)))
        start = text[:cut]
        text = [*start, *np.random.default_rng(len(self.texts)).integers(0, 3, more).tolist()][:CONTEXT] or [1]
        self.texts.append(text)
        return text

    @rule(data=st.data())
    def insert(self, data: st.DataObject) -> None:
        text = self.new_text(data)
        found = self.pool.put(text)
        expected = max((common_length(text, other) for other in self.inserted), default=0)
        assert found <= expected
        assert found == expected or self.evicted
        self.inserted.append(text)

    @rule(data=st.data())
    def match(self, data: st.DataObject) -> None:
        text = self.new_text(data)
        expected = max((common_length(text, other) for other in self.inserted), default=0)
        found = self.pool.held(text)
        assert found <= expected
        assert found == expected or self.evicted

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        text = data.draw(st.sampled_from(self.texts))
        before = [self.pool.held(other) for other in self.texts]
        self.pool.cache.forget(text)
        for other, held in zip(self.texts, before, strict=True):
            now = self.pool.held(other)
            assert now == held or (now < held <= common_length(other, text))
        self.evicted = True

    @rule(data=st.data())
    def start_a_sequence(self, data: st.DataObject) -> None:
        if len(self.running) < SEQUENCES - 1:  # `put` needs one
            text = self.new_text(data)
            self.running[self.pool.start(text)[0]] = text

    @rule(data=st.data(), is_kept=st.booleans())
    def end_a_sequence(self, data: st.DataObject, is_kept: bool) -> None:
        if self.running:
            sequence = data.draw(st.sampled_from(sorted(self.running)))
            text = self.running.pop(sequence)
            if is_kept:
                self.pool.end(sequence, text)
                self.inserted.append(text)
            else:
                self.pool.pool.free(sequence)

    @rule(pages=st.integers(-2, 8))
    def evict(self, pages: int) -> None:
        free, held = self.pool.pool.free_pages, set(self.pool.cache.held_pages())
        self.pool.cache.evict(pages)
        gone = held - set(self.pool.cache.held_pages())
        of_sequences = {page for sequence in self.running for page in self.pool.pool.pages(sequence)}
        assert not gone & of_sequences
        assert self.pool.pool.free_pages == free + len(gone)
        assert len(gone) <= max(0, pages)
        assert self.running or len(gone) == min(max(0, pages), len(held))
        self.evicted |= bool(gone)

    @rule()
    def clear(self) -> None:
        self.pool.cache.clear()
        assert self.pool.cache.held_pages() == []
        self.inserted, self.evicted = [], False

    @invariant()
    def pages_are_counted_and_sequences_unchanged(self) -> None:
        self.pool.check()
        for sequence, text in self.running.items():
            assert self.pool.stored(self.pool.pool.pages(sequence), len(text)) == text
        if self.pool.pool.free_pages < 8:  # room for the next rule
            self.pool.cache.evict(8)
            self.evicted = True


TestCache = CacheMachine.TestCase


# -- least recently used first


@given(data=st.data(), lengths=st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=6))
def test_least_recently_used_pages_go_first(data: st.DataObject, lengths: list[int]) -> None:
    pool = CachedPool()
    texts = {first: [first] + [7] * (length - 1) for first, length in enumerate(lengths)}
    for text in texts.values():
        pool.put(text)
    use = data.draw(st.lists(st.sampled_from(sorted(texts)), max_size=8))
    for first in use:
        pool.held(texts[first])
    last_use = dict.fromkeys(texts, -1) | {first: place for place, first in enumerate(use)}
    order = sorted(texts, key=lambda first: (last_use[first], first))
    kept = data.draw(st.sampled_from([None, *texts]))  # a sequence holds this text
    if kept is not None:
        sequence, _ = pool.start(texts[kept])
        order.remove(kept)
    left = {first: pages_of(length) for first, length in enumerate(lengths)}
    while any(left[first] for first in order):
        oldest = next(first for first in order if left[first])
        left[oldest] -= 1
        pool.cache.evict(1)
        assert len(pool.cache.held_pages()) == sum(left.values())
        pages = [pages_below(pool.cache, first) for first in texts]
        assert pages == list(left.values())
    pool.cache.evict(1)
    if kept is not None:
        assert len(pool.cache.held_pages()) == left[kept]
        pool.pool.free(sequence)
    pool.check()


def pages_below(cache: PrefixCache, first: int) -> int:
    """Return how many pages belong to the text with a first token; looking does not count as a use."""
    return sum(_first_token(node) == first for node in cache._nodes())


def _first_token(node: Any) -> int:
    while node.parent.page >= 0:
        node = node.parent
    return int(node.tokens[0])


# -- one thing at a time


def test_a_longer_part_of_a_page_replaces_a_shorter_one() -> None:
    pool = CachedPool()
    pool.put([1, 2, 3])
    first = pool.cache.held_pages()
    assert pool.put([1, 2, 3, 4, 5]) == 3
    assert len(pool.cache.held_pages()) == 1
    assert pool.cache.held_pages() != first  # the shorter one was shared when the longer one was written
    assert pool.held([1, 2, 3, 4, 5, 6]) == 5
    assert pool.put([1, 2]) == 2
    assert pool.held([1, 2, 3, 4, 5, 6]) == 5
    full = [1, 2, 3, 4, 5] + [6] * PAGE
    assert pool.put(full) == 5
    assert len(pool.cache.held_pages()) == 2
    assert pool.held(full) == PAGE + 5
    pool.check()


def test_parts_of_a_page_that_differ_stay_side_by_side() -> None:
    pool = CachedPool()
    start = [1] * PAGE
    for end in ([2, 3], [2, 4], [5]):
        pool.put([*start, *end])
    assert len(pool.cache.held_pages()) == 4
    for end, common in (([2, 3, 9], 2), ([2, 4], 2), ([2, 9], 1), ([5, 5], 1), ([9], 0)):
        assert pool.held([*start, *end]) == PAGE + common
    assert pool.held([1] * (PAGE - 1)) == PAGE - 1


def test_pages_of_sequences_are_not_let_go_of() -> None:
    pool = CachedPool()
    text = [1] * (PAGE + 10)
    pool.put(text)
    sequence, length = pool.start(text)
    assert length == len(text)
    pool.cache.evict(2)
    assert len(pool.cache.held_pages()) == 2
    pool.pool.free(sequence)
    pool.cache.evict(2)
    assert pool.pool.free_pages == PAGES
    pool.check()


def test_forgetting_keeps_what_a_longer_text_begins_with() -> None:
    pool = CachedPool()
    shared = [1] * PAGE
    short, long = [*shared, 2, 3], [*shared, 2, 4, *[5] * PAGE]
    for text in (short, long):
        pool.put(text)
    pool.cache.forget(short)
    assert (pool.held(short), pool.held(long)) == (PAGE + 1, len(long))
    pool.cache.forget(long[:-1])
    assert pool.held(long) == len(long)
    pool.cache.forget(long)
    assert pool.held(long) == 0
    assert pool.cache.held_pages() == []
    pool.check()


def test_clearing_does_not_touch_what_a_sequence_holds() -> None:
    pool = CachedPool()
    text = list(range(300))
    pool.put(text)
    sequence, _ = pool.start(text)
    pool.cache.clear()
    assert pool.stored(pool.pool.pages(sequence), 300) == text
    assert pool.cache.match(text) == Prefix([], 0, 0)
    pool.check()
    pool.end(sequence, text)
    assert pool.held(text) == 300


@given(left=st.lists(st.integers(0, 1), max_size=6), right=st.lists(st.integers(0, 1), max_size=6))
def test_common_length(left: list[int], right: list[int]) -> None:
    length = common_length(left, right)
    assert left[:length] == right[:length]
    assert left[length : length + 1] != right[length : length + 1] or length == len(left) == len(right)


def test_only_what_was_computed_as_a_prompt_is_found_on_demand() -> None:
    """The rest of a text was generated: it is found, but not by a request for the keys and values of a prompt."""
    pool = CachedPool()
    text = list(range(300))
    sequence, _ = pool.start(text)
    pool.cache.insert(text, pool.pool.pages(sequence), prompt_tokens=280)
    assert pool.cache.match([*text, 7])[1:3] == (300, 280)
    assert pool.cache.match([*text, 7], prompt_only=True)[1:3] == (280, 280)
    assert pool.cache.match(text[:100], prompt_only=True)[1:3] == (100, 100)
    pool.pool.free(sequence)
    pool.check()

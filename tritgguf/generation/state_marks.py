"""Where copies of requests' states are made, in a model that has states, so that later requests can go on from them.

A request's state is copied a few tokens before its prompt ends, because the next turn of a chat begins with this text
but may have another answer; and where a text before it has the same tokens, which others may have too. What it has at
its end is kept as well. Copies belong to the request until it ends, then to the cache of prefixes, which lets go of the
least recently used ones.
"""

from __future__ import annotations

from tritgguf.generation.prefix_cache import KeptState, Prefix, PrefixCache
from tritgguf.generation.request import RunningRequest
from tritgguf.runtime.kv_pool import KVPool

WORTH_COPYING = 64  # tokens that somebody would evaluate again
_BEFORE_END = 8  # tokens at a prompt's end that the next turn of a chat may not have, such as the answer's beginning


class StateMarks:
    """Plans copies of states and hands them on; does nothing in a model without states."""

    def __init__(self, pool: KVPool, prefix_cache: PrefixCache) -> None:
        self._pool, self._states, self._cache = pool, pool.states, prefix_cache

    def plan(self, request: RunningRequest, prefix: Prefix) -> None:
        """Plan the copies of a request that has got a sequence, which begins with a part of a stored prefix."""
        for_tokens = request.request.wanted == "tokens"
        end = request.prompt_length - _BEFORE_END if for_tokens else request.request.first_output
        for length in (prefix.common, end):
            self.add(request, min(length, request.prompt_length))

    def add(self, request: RunningRequest, length: int) -> None:
        """Plan a copy of a running request's state after so many tokens, if it is worth one and there is room."""
        if self._states is None or request.sequence is None or length in request.state_marks:
            return
        keeps = request.request.cache_prompt and request.request.keep_prompt
        if not keeps or length < request.evaluated + WORTH_COPYING or not self._cache.make_room_for_state():
            return
        copy = self._states.mark(request.sequence, length)
        if copy is not None:
            request.state_marks[length] = copy

    def latest(self, request: RunningRequest, most: int) -> tuple[int, int] | None:
        """Return the longest text, of at most `most` tokens, after which a running request's state has been copied.

        That is its length and the copy; None if there is none.
        """
        made = [mark for mark in request.state_marks.items() if mark[0] <= min(most, request.evaluated)]
        return max(made, default=None)

    def awaits(self, request: RunningRequest, common: int) -> bool:
        """Tell whether a running request, with so many tokens in common, is about to make a copy to wait for.

        One is planned if there is none.
        """
        worth = request.evaluated + WORTH_COPYING
        if common < worth:
            return False
        if not any(worth <= length <= common for length in request.state_marks):
            self.add(request, common)
        return any(worth <= length <= common for length in request.state_marks)

    def of_ended(self, request: RunningRequest) -> dict[int, KeptState]:
        """Return the copies of a request that has ended, its last state among them, by length; they are no more its."""
        if self._states is None or request.sequence is None:
            return {}
        found = {length: copy for length, copy in request.state_marks.items() if length <= request.evaluated}
        for length in found:
            del request.state_marks[length]
        last = request.evaluated
        is_whole = last and last == self._pool.lengths[request.sequence]
        if is_whole and last not in found and self._cache.make_room_for_state():
            copy = self._states.keep(request.sequence)
            found |= {} if copy is None else {last: copy}
        return {length: KeptState(copy, min(length, request.computed_as_prompt)) for length, copy in found.items()}

    def forget(self, request: RunningRequest) -> None:
        """Let go of the copies that a request still has."""
        for copy in request.state_marks.values():
            assert self._states is not None
            self._states.release(copy)
        request.state_marks.clear()

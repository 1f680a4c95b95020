"""Pages of earlier requests, found again by the tokens that they begin with.

A radix tree with a page at each node: an inner node is a full page of 256 tokens, a leaf may be a part of one. A
request takes over the longest prefix that it shares with the tree, to the token: it shares the pages, and the pool
copies the last one before something else is written to it. The tree and running sequences may hold a page at once.

In a model with states (`StatePool`), nodes hold copies of states too, after some of their tokens, and a request takes
over a prefix up to the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cpu_kernels.transformer.kv_pages import PAGE
from tritgguf.runtime.kv_pool import KVPool


class Prefix(NamedTuple):
    """Stored keys and values of the first tokens of a text.

    Attributes:
        pages: where they are.
        length: how many tokens.
        prompt_tokens: how many of them, from the first on, were computed as a prompt.
        state: the copy of the state after them, in a model that has states; None without a token.
        common: how many tokens are stored, whether or not the state after them is.

    """

    pages: list[int]
    length: int
    prompt_tokens: int
    state: int | None = None
    common: int = 0


@dataclass(frozen=True)
class KeptState:
    """A copy of a state.

    Attributes:
        copy: its number in the pool of states.
        prompt_tokens: how many of the tokens before it, from the first on, were computed as a prompt.

    """

    copy: int
    prompt_tokens: int


@dataclass(eq=False)
class _Node:
    tokens: tuple[int, ...]
    page: int
    parent: _Node | None
    last_use: int = 0
    prompt_tokens: int = 0  # of its tokens, from the first on, computed as a prompt
    children: list[_Node] = field(default_factory=list)
    states: dict[int, KeptState] = field(default_factory=dict)  # after so many of its tokens
    state_uses: dict[int, int] = field(default_factory=dict)  # the last use of each


class PrefixCache:
    """Holds pages of a pool; the least recently used are let go of when pages are needed."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._root = _Node((), -1, None)
        self._clock = 0

    def match(self, tokens: Sequence[int], *, prompt_only: bool = False) -> Prefix:
        """Return the longest prefix of `tokens` that is held; with `prompt_only`, of those computed as a prompt."""
        self._clock += 1
        if self._pool.states is not None:
            return self._match_state(tokens, prompt_only=prompt_only)
        pages: list[int] = []
        node, length, prompt_tokens = self._root, 0, 0
        while length < len(tokens):
            child, common = _closest(node.children, tokens[length : length + PAGE])
            if child is None:
                break
            computed_as_prompt = min(common, child.prompt_tokens)
            if prompt_only:
                common = computed_as_prompt
            common = self._pool.resumable([child.page], common)
            computed_as_prompt = min(common, computed_as_prompt)
            if not common:
                break
            child.last_use = self._clock
            pages.append(child.page)
            if prompt_tokens == length:
                prompt_tokens += computed_as_prompt
            length += common
            if common < PAGE:
                break
            node = child
        return Prefix(pages, length, prompt_tokens, common=length)

    def _match_state(self, tokens: Sequence[int], *, prompt_only: bool) -> Prefix:
        """Do what `match` does in a model with states."""
        node, best, pages = self._root, Prefix([], 0, 0), list[int]()
        length = prompt_tokens = most = 0
        used: tuple[_Node, int] | None = None
        while length < len(tokens):
            chunk, whole = tokens[length : length + PAGE], None
            for child in node.children:
                common = common_length(child.tokens, chunk) if child.tokens[0] == chunk[0] else 0
                common = min(common, child.prompt_tokens) if prompt_only else common
                most = max(most, length + common)
                computed = prompt_tokens + (child.prompt_tokens if prompt_tokens == length else 0)
                for place, state in child.states.items():
                    is_usable = place <= common and (state.prompt_tokens >= length + place or not prompt_only)
                    if is_usable and length + place > best.length:
                        as_prompt = min(computed, state.prompt_tokens, length + place)
                        best = Prefix([*pages, child.page], length + place, as_prompt, state.copy)
                        used = child, place
                if common == PAGE:
                    whole = child
            if whole is None:
                break
            whole.last_use = self._clock
            pages.append(whole.page)
            prompt_tokens += min(PAGE, whole.prompt_tokens) if prompt_tokens == length else 0
            length += PAGE
            node = whole
        if used is not None:
            used[0].last_use = used[0].state_uses[used[1]] = self._clock
        return best._replace(common=most)

    def insert(
        self,
        tokens: Sequence[int],
        pages: Sequence[int],
        prompt_tokens: int | None = None,
        states: Mapping[int, KeptState] | None = None,
    ) -> None:
        """Hold the pages of a sequence: page k has the keys and values of tokens[256 k : 256 (k + 1)].

        `prompt_tokens` says how many of the tokens were computed as a prompt; None: all. `states` are copies of the
        state after so many tokens, which are the tree's from now on.
        """
        missing = dict(states or {})
        left = len(tokens) if prompt_tokens is None else prompt_tokens
        self._clock += 1
        node = self._root
        for place, page in enumerate(pages):
            chunk = tuple(tokens[place * PAGE : (place + 1) * PAGE])
            if not chunk:
                return
            child, common = _closest(node.children, chunk)
            if child is not None and common == len(chunk):  # held already
                child.last_use = self._clock
            elif child is not None and common == len(child.tokens) and len(chunk) > common:  # a longer one of its kind
                self._pool.retain(page)
                self._pool.release(child.page)
                child.tokens, child.page, child.last_use = chunk, page, self._clock
                child.prompt_tokens = max(0, min(left, len(chunk)))
            else:
                self._pool.retain(page)
                child = _Node(chunk, page, node, self._clock, max(0, min(left, len(chunk))))
                node.children.append(child)
            self._hold_states(child, place * PAGE, missing)
            if len(chunk) < PAGE:
                return
            node, left = child, left - PAGE

    def _hold_states(self, node: _Node, start: int, states: dict[int, KeptState]) -> None:
        """Move the copies of states after tokens of a node, which begins at token `start`, to the node."""
        for length in [length for length in states if start < length <= start + PAGE]:
            place, state = length - start, states.pop(length)
            if place in node.states:
                self._release(node.states[place] if state.prompt_tokens >= length else state)
            if place not in node.states or state.prompt_tokens >= length:
                node.states[place] = state
            node.state_uses[place] = self._clock

    def _release(self, state: KeptState) -> None:
        assert self._pool.states is not None
        self._pool.states.release(state.copy)

    def make_room_for_state(self) -> bool:
        """Let go of the least recently used copy of a state if there is no room for another; tell whether there is."""
        assert self._pool.states is not None
        if not self._pool.states.copies_left:
            kept = [(node.state_uses[place], node, place) for node in self._nodes() for place in node.states]
            if kept:
                _, node, place = min(kept, key=lambda state: state[0])
                self._release(node.states.pop(place))
                del node.state_uses[place]
        return self._pool.states.copies_left > 0

    def held_states(self) -> list[int]:
        """Return all copies of states that are held."""
        return [state.copy for node in self._nodes() for state in node.states.values()]

    def evict(self, pages: int) -> None:
        """Let go of least recently used pages until so many more are free, or none is held that nobody else holds."""
        wanted = self._pool.free_pages + pages
        while self._pool.free_pages < wanted:
            leaves = [node for node in self._nodes() if not node.children]
            unshared = [node for node in leaves if self._pool.references[node.page] == 1]
            if not unshared:
                return
            self._remove(min(unshared, key=lambda node: node.last_use))

    def forget(self, tokens: Sequence[int]) -> None:
        """Let go of the pages that hold these tokens and that no longer text needs."""
        node, path = self._root, list[_Node]()
        for start in range(0, len(tokens), PAGE):
            chunk = tuple(tokens[start : start + PAGE])
            child = next((child for child in node.children if child.tokens == chunk), None)
            if child is None:
                break
            path.append(child)
            node = child
        for node in reversed(path):
            if node.children:
                break
            self._remove(node)

    def clear(self) -> None:
        """Let go of everything."""
        for node in list(self._nodes()):
            self._let_go(node)
        self._root.children.clear()

    def held_pages(self) -> list[int]:
        """Return all pages that are held."""
        return [node.page for node in self._nodes()]

    def _remove(self, node: _Node) -> None:
        assert node.parent is not None
        node.parent.children.remove(node)
        self._let_go(node)

    def _let_go(self, node: _Node) -> None:
        self._pool.release(node.page)
        for state in node.states.values():
            self._release(state)

    def _nodes(self) -> Iterator[_Node]:
        waiting = list(self._root.children)
        while waiting:
            node = waiting.pop()
            waiting += node.children
            yield node


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two sequences share at their beginning."""
    length = min(len(left), len(right))
    if tuple(left[:length]) == tuple(right[:length]):
        return length
    return next(place for place in range(length) if left[place] != right[place])


def _closest(nodes: Sequence[_Node], tokens: Sequence[int]) -> tuple[_Node | None, int]:
    """Return the node that shares most tokens with the beginning of `tokens`, and how many; None for no token."""
    best, most = None, 0
    for node in nodes:
        if node.tokens[0] == tokens[0] and (common := common_length(node.tokens, tokens)) > most:
            best, most = node, common
    return best, most

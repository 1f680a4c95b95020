"""States of sequences, of models that have layers with a state, and copies of them to go on from.

Keys and values of a sequence can be cut anywhere, a state cannot: it is a matrix for each head, and every token changes
it. So a sequence has one state, and a copy of it is made where another sequence may go on later. `marks` say after how
many tokens the kernels copy a sequence's state, within a forward pass. States are numbers of rows of one array, of
which the system gives memory only to what is written.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cpu_kernels.transformer.aligned import aligned_zeros

MARKS = 2  # places at which a sequence's state may be copied before it ends
_NONE = -1


class StatePool:
    """The states of as many sequences, and so many copies. One thread at a time may use it.

    Attributes:
        numbers: float32 [states, layers, numbers].
        of_sequences: int64 [sequences]: the state of each.
        marks: int64 [sequences, MARKS]: after so many tokens the state is copied; 0 for never.
        mark_states: int64 [sequences, MARKS]: what it is copied to.

    """

    def __init__(self, shape: tuple[int, int], sequences: int, copies: int) -> None:
        self.numbers = aligned_zeros((sequences + copies, *shape), np.float32)
        self.of_sequences = np.full(sequences, _NONE, np.int64)
        self.marks = np.zeros((sequences, MARKS), np.int64)
        self.mark_states = np.zeros((sequences, MARKS), np.int64)
        self._copies_left = copies
        self._free = list(range(sequences + copies - 1, -1, -1))
        self._written = np.zeros(sequences + copies, bool)

    @property
    def copies_left(self) -> int:
        """How many more copies there may be."""
        return self._copies_left

    def start(self, sequence: int, copy: int | None = None) -> None:
        """Give a sequence a state: that of a copy, or one of no tokens."""
        state = self._free.pop()
        self.of_sequences[sequence] = state
        if copy is not None:
            self.numbers[state] = self.numbers[copy]
        elif self._written[state]:
            self.numbers[state] = 0.0
        self._written[state] = True

    def clear(self, sequence: int) -> None:
        """Make a sequence's state that of no tokens."""
        self.numbers[self.of_sequences[sequence]] = 0.0

    def end(self, sequence: int) -> None:
        """Take a sequence's state and its marks."""
        self._free.append(int(self.of_sequences[sequence]))
        self.of_sequences[sequence] = _NONE
        self.marks[sequence] = 0

    def mark(self, sequence: int, tokens: int) -> int | None:
        """Have a sequence's state copied after so many tokens; return the copy, None without room for one."""
        places = np.flatnonzero(self.marks[sequence] == 0)
        if not self._copies_left or not len(places):
            return None
        copy = self._take_copy()
        self.marks[sequence, places[0]], self.mark_states[sequence, places[0]] = tokens, copy
        return copy

    def keep(self, sequence: int) -> int | None:
        """Return a sequence's present state as a copy, before it ends; None without room for one.

        The sequence gets one that was not written, and can only end.
        """
        if not self._copies_left:
            return None
        replacement = self._take_copy()
        kept = int(self.of_sequences[sequence])
        self.of_sequences[sequence] = replacement
        return kept

    def release(self, copy: int) -> None:
        """Let go of a copy."""
        if copy in self._free:
            raise ValueError("the copy is free already")
        self._copies_left += 1
        self._free.append(copy)

    def check(self, copies: Iterable[int]) -> None:
        """Raise AssertionError unless every state is free, a sequence's or one of these copies, once each."""
        held = [*self.of_sequences[self.of_sequences != _NONE].tolist(), *copies]
        assert sorted([*held, *self._free]) == list(range(len(self.numbers))), "states are not counted right"
        assert len(set(held)) == len(held), "a state is held twice"

    def _take_copy(self) -> int:
        self._copies_left -= 1
        copy = self._free.pop()
        self._written[copy] = True
        return copy

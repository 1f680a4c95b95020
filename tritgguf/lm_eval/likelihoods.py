"""Log-likelihoods of many continuations, evaluated side by side; what contexts share is evaluated once.

Requests are sorted by their tokens, so that those with a common beginning follow one another: the engine lets them take
over its keys and values. Continuations that differ in their last token only, such as the letters of a multiple choice,
are one request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tritgguf.errors import DamagedFileError
from tritgguf.generation.engine import Engine
from tritgguf.generation.request import Request, RunningRequest

_SUBMITTED_PER_SEQUENCE = 3  # requests in the engine for each that runs, so that those that wait for a prefix stop none


class Continuation(NamedTuple):
    """Token ids of a context and of what follows it, at least one each."""

    context: Sequence[int]
    tokens: Sequence[int]


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log_likelihood: the natural logarithm of its probability.
        is_greedy: whether each of its tokens is the likeliest one.

    """

    log_likelihood: float
    is_greedy: bool


@dataclass
class _Group:
    """Continuations with the same tokens but for the last one: a prompt, and the tokens that may follow it."""

    prompt: list[int]
    first_output: int
    last_tokens: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # in the list of continuations
    leads: bool = True  # it is the first of its context: its keys and values are worth keeping

    def reduce(self, rows: np.ndarray, first: int) -> np.ndarray:
        """Return float64 [rows, 2 + candidates] for logits, float32 [rows, vocabulary], from position `first` on.

        The likeliest token, the log probability of the prompt's next token (NaN behind the last one), and those of the
        candidates for the last token.
        """
        largest = rows.max(axis=1)
        if not np.isfinite(largest).all():
            raise DamagedFileError("a logit is infinite or not a number: a model overflows on this text, or is damaged")
        log_sums = largest + np.log(np.exp(rows - largest[:, None]).sum(axis=1, dtype=np.float64))
        found = np.full((len(rows), 2 + len(self.last_tokens)), np.nan)
        found[:, 0] = rows.argmax(axis=1)
        following = self.prompt[first + 1 : first + 1 + len(rows)]
        count = len(following)
        found[:count, 1] = rows[np.arange(count), following] - log_sums[:count]
        found[:, 2:] = rows[:, self.last_tokens] - log_sums[:, None]
        return found

    def likelihoods(self, found: np.ndarray) -> Iterator[tuple[int, Likelihood]]:
        """Yield the place and the likelihood of each continuation, from the rows that `reduce` has returned."""
        before = found[:-1, 1].sum()
        greedy = bool((found[:-1, 0] == self.prompt[self.first_output + 1 :]).all())
        for place, token, last in zip(self.places, self.last_tokens, found[-1, 2:], strict=True):
            yield place, Likelihood(float(before + last), greedy and bool(found[-1, 0] == token))


def log_likelihoods(
    engine: Engine, continuations: Sequence[Continuation], on_done: Callable[[int], None] | None = None
) -> list[Likelihood]:
    """Return the likelihood of each continuation, in order.

    `on_done` is called with the number of continuations that are done, again and again. Raises TritGgufError for a
    context and continuation that are longer than the engine's context, and for logits that are not finite.
    """
    results: list[Likelihood | None] = [None] * len(continuations)
    done = 0
    waiting = iter(_leaders_first(_groups(continuations), engine.parallel))
    running = deque[tuple[_Group, RunningRequest]]()
    try:
        while True:
            while len(running) < _SUBMITTED_PER_SEQUENCE * engine.parallel and (group := next(waiting, None)):
                running.append((group, engine.submit(_request(group))))
            if not running:
                break
            group, request = running[0]
            for place, likelihood in group.likelihoods(engine.outputs(request)):
                results[place] = likelihood
            running.popleft()
            done += len(group.places)
            if on_done is not None:
                on_done(done)
    finally:
        for _, request in running:
            engine.cancel(request)
    return [result for result in results if result is not None]


def _request(group: _Group) -> Request:
    return Request(
        group.prompt,
        wanted="logits",
        first_output=group.first_output,
        reduce_outputs=group.reduce,
        keep_prompt=group.leads,
    )


def _groups(continuations: Iterable[Continuation]) -> list[_Group]:
    """Return groups in the order of their tokens."""
    groups = dict[tuple[int, tuple[int, ...]], _Group]()
    for place, (context, tokens) in enumerate(continuations):
        prompt = [*context, *tokens[:-1]]
        group = groups.setdefault((len(context), tuple(prompt)), _Group(prompt, len(context) - 1))
        group.last_tokens.append(tokens[-1])
        group.places.append(place)
    return sorted(groups.values(), key=lambda group: group.prompt)


def _leaders_first(groups: Sequence[_Group], contexts: int) -> Iterator[_Group]:
    """Yield the first group of each of so many contexts, then their other groups, and so on.

    When these start, the contexts have been evaluated, also those that are too short for the engine to wait for them.
    """
    by_context = dict[tuple[int, ...], list[_Group]]()
    for group in groups:
        family = by_context.setdefault(tuple(group.prompt[: group.first_output + 1]), [])
        group.leads = not family
        family.append(group)
    families = list(by_context.values())
    for first in range(0, len(families), contexts):
        part = families[first : first + contexts]
        yield from (family[0] for family in part)
        yield from (group for family in part for group in family[1:])

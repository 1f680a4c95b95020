"""Log-likelihoods of many continuations, evaluated side by side; what contexts share is evaluated once.

Requests are sorted by their tokens, so that those with a common beginning follow one another: the engine lets them take
over its keys and values. Continuations that differ in their last token only, such as the letters of a multiple choice,
are one request. Of the other continuations of a context, one starts; the rest follows when its pass has ended, beside
the next contexts, so that every pass is full: a small one costs much for its tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tritgguf.errors import DamagedFileError
from tritgguf.generation.engine import Engine
from tritgguf.generation.prefix_cache import common_length
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.scheduler import Budget

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
    leader: _Group | None = None  # the first one of its context, if that is another one
    followers: list[_Group] = field(default_factory=list)  # the other ones of its context
    unfinished: int = 1  # of it and its followers
    new_tokens: int = 0  # which no group before it has, as many as its first pass may evaluate

    def note_shared(self, tokens: int) -> None:
        """Note how many of its first tokens are probably evaluated before it starts."""
        outputs = len(self.prompt) - self.first_output  # of which the first is evaluated in any case
        self.new_tokens = self.first_output - min(tokens, self.first_output) + min(outputs, Budget.outputs)

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


class _Running(NamedTuple):
    group: _Group
    request: RunningRequest

    @property
    def new_tokens(self) -> int:
        """About how many tokens a pass may evaluate."""
        return min(self.group.new_tokens, self.request.pending)


def log_likelihoods(
    engine: Engine, continuations: Sequence[Continuation], on_done: Callable[[int], None] | None = None
) -> list[Likelihood]:
    """Return the likelihood of each continuation, in order.

    `on_done` is called with the number of continuations that are done, again and again. Raises TritGgufError for a
    context and continuation that are longer than the engine's context, and for logits that are not finite.
    """
    results: list[Likelihood | None] = [None] * len(continuations)
    done = 0
    waiting, running, kept = deque(_leaders(_groups(continuations))), list[_Running](), list[_Group]()
    try:
        while waiting or running:
            _submit(engine, waiting, running)
            engine.outputs(running[0].request)
            ended = [one for one in running if one.request.ended]
            running[:] = [one for one in running if not one.request.ended]
            for one in ended:
                for place, likelihood in one.group.likelihoods(engine.outputs(one.request)):
                    results[place] = likelihood
                done += len(one.group.places)
            kept = _still_kept(engine, kept, [one.group for one in ended])
            waiting.extendleft(follower for one in reversed(ended) for follower in reversed(one.group.followers))
            if on_done is not None:
                on_done(done)
    finally:
        for one in running:
            engine.cancel(one.request)
    return [result for result in results if result is not None]


def _submit(engine: Engine, waiting: deque[_Group], running: list[_Running]) -> None:
    """Let groups run, until there are tokens for a full pass.

    Not more: a group that starts before its leader has ended would evaluate their context once more.
    """
    left = Budget.tokens - sum(one.new_tokens for one in running)
    while waiting and left > 0 and len(running) < _SUBMITTED_PER_SEQUENCE * engine.parallel:
        running.append(_Running(group := waiting.popleft(), engine.submit(_request(group))))
        left -= group.new_tokens


def _still_kept(engine: Engine, kept: Sequence[_Group], ended: Sequence[_Group]) -> list[_Group]:
    """Return the leaders whose keys and values are still of use, and let the engine forget those of the others.

    A leader is of use to its followers. The last one is of use to the next leader, which shares most with it.
    """
    leaders = [*kept, *(group for group in ended if group.leader is None)]
    for group in ended:
        (group.leader or group).unfinished -= 1
    for leader in leaders[:-1]:
        if not leader.unfinished:
            engine.forget_prefix(leader.prompt)
    return [leader for leader in leaders[:-1] if leader.unfinished] + leaders[-1:]


def _request(group: _Group) -> Request:
    return Request(
        group.prompt,
        wanted="logits",
        first_output=group.first_output,
        reduce_outputs=group.reduce,
        keep_prompt=group.leader is None,
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


def _leaders(groups: Sequence[_Group]) -> list[_Group]:
    """Return the first group of each context; it has the other ones of its context as followers.

    Those with followers come first, so that no followers are left for a small pass at the end.
    """
    found = dict[tuple[int, ...], _Group]()
    for group in groups:
        leader = found.setdefault(tuple(group.prompt[: group.first_output + 1]), group)
        if leader is not group:
            group.leader = leader
            leader.unfinished += 1
            group.note_shared(group.first_output)
            leader.followers.append(group)
    leaders = sorted(found.values(), key=lambda leader: not leader.followers)
    for before, leader in zip([None, *leaders], leaders, strict=False):
        leader.note_shared(0 if before is None else common_length(before.prompt, leader.prompt))
    return leaders

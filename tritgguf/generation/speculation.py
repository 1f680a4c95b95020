"""Speculative decoding: tokens that may come next are evaluated together with the last one, in a single pass.

A drafter guesses how an answer goes on. The guess, the draft, is evaluated as generated tokens, each with logits. Then
the request's own sampler chooses token after token from the same logits as without speculation, and goes on as long as
it chooses what the draft has. So neither tokens nor their probabilities change: a draft of certain tokens needs no
other rule for rejecting them. What changes is the number of passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from tritgguf.generation.request import RunningRequest
from tritgguf.generation.scheduler import Chunk

DEFAULT_DRAFT_MAX = 16  # as in llama.cpp
_MOST_TOKENS = 64  # of a pass with drafts: each has a row of logits
_WORTH_DRAFTING = 1.1  # times the tokens per second without: estimates are not exact

# Time of a pass of so many generated tokens over that of one, measured with d=2: Qwen2.5-Coder-1.5B, two cores of
# an AMD EPYC of the Zen 5 generation. docs/engine.md says what is lost with AVX2 and for SmolLM2: a part of the gain.
_MEASURED = {1: 1.0, 2: 1.6, 4: 2.0, 8: 2.8, 16: 5.0, 32: 10.0, 64: 20.0}
_PASS_COSTS = np.interp(range(_MOST_TOKENS + 1), list(_MEASURED), list(_MEASURED.values())).tolist()


class Drafter(Protocol):
    """Guesses how answers go on.

    Attributes:
        step_cost: time to draft one more token for all requests, over that of a pass of one token.

    """

    step_cost: float

    def expect(self, requests: Sequence[RunningRequest], most: Sequence[int]) -> list[list[float]]:
        """Return how probably the first token of each request's draft is accepted, the first two, and so on.

        `most` says how many tokens each draft may have; lists may be shorter.
        """

    def draft(self, requests: Sequence[RunningRequest], lengths: Sequence[int]) -> list[list[int]]:
        """Return a draft for each request, of at most so many tokens; the requests are those of `expect`."""

    def forget(self, request: RunningRequest) -> None:
        """Free what is kept for a request that has ended."""


class Speculation:
    """Adds drafts to the chunks of a forward pass: as many tokens as probably save time."""

    def __init__(self, drafter: Drafter, draft_max: int = DEFAULT_DRAFT_MAX) -> None:
        """Use a drafter; `draft_max` is the largest number of tokens of a draft."""
        self._drafter, self._draft_max = drafter, draft_max

    @property
    def can_pay(self) -> bool:
        """Whether it saves time if everything in the draft of a single sequence is accepted."""
        return any(draft_lengths([[1.0] * self._draft_max], 1, self._drafter.step_cost))

    def with_drafts(self, chunks: list[Chunk], context: int) -> list[Chunk]:
        """Return chunks of which some have drafts; a sequence has at most `context` tokens."""
        chosen = [chunk for chunk in chunks if _may_be_drafted(chunk)]
        if not chosen:
            return chunks
        requests = [chunk.request for chunk in chosen]
        most = [min(self._draft_max, _room(request, context)) for request in requests]
        expected = self._drafter.expect(requests, most)
        generated = sum(chunk.tokens for chunk in chunks if not chunk.is_prompt)
        lengths = draft_lengths(expected, generated, self._drafter.step_cost)
        if not any(lengths):
            return chunks
        drafts = zip(requests, self._drafter.draft(requests, lengths), strict=True)
        drafted = {request: _until_stop(draft, request) for request, draft in drafts}
        return [_with_draft(chunk, drafted.get(chunk.request, ())) for chunk in chunks]

    def forget(self, request: RunningRequest) -> None:
        """Free what is kept for a request that has ended."""
        self._drafter.forget(request)


def draft_lengths(expected: Sequence[Sequence[float]], generated: int, step_cost: float) -> list[int]:
    """Return the numbers of draft tokens that give most tokens per second.

    Args:
        expected: for each request, how probably its first draft token is accepted, the first two, and so on.
        generated: generated tokens of the pass without drafts.
        step_cost: see `Drafter`.

    """
    lengths = [0] * len(expected)
    if generated >= _MOST_TOKENS:
        return lengths
    tokens = sorted(
        (-probability, place, request)
        for request, probabilities in enumerate(expected)
        for place, probability in enumerate(probabilities)
    )
    best, best_rate = lengths.copy(), _WORTH_DRAFTING * generated / _PASS_COSTS[generated]
    worth = float(generated)  # tokens that the pass probably gives
    for count, (negative, _, request) in enumerate(tokens[: _MOST_TOKENS - generated], 1):
        lengths[request] += 1
        worth -= negative
        rate = worth / (_PASS_COSTS[generated + count] + step_cost * max(lengths))
        if rate > best_rate:
            best, best_rate = lengths.copy(), rate
    return best


def _may_be_drafted(chunk: Chunk) -> bool:
    """Tell whether a chunk is an answer's last token and nothing else."""
    return not chunk.is_prompt and chunk.tokens == chunk.outputs == 1


def _room(request: RunningRequest, context: int) -> int:
    """Return how many tokens of a draft could become part of the answer."""
    room = context - len(request.tokens)
    if request.request.max_tokens is not None:
        room = min(room, request.request.max_tokens - (len(request.tokens) - request.prompt_length) - 1)
    return max(0, room)


def _until_stop(draft: Sequence[int], request: RunningRequest) -> tuple[int, ...]:
    """Return the tokens before the first that would end the answer: whether it comes is decided without it."""
    stop = next((place for place, token in enumerate(draft) if token in request.request.stop_tokens), len(draft))
    return tuple(draft[:stop])


def _with_draft(chunk: Chunk, draft: tuple[int, ...]) -> Chunk:
    return replace(chunk, tokens=chunk.tokens + len(draft), outputs=chunk.outputs + len(draft), draft=draft)

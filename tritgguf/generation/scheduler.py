"""Which tokens the next forward pass takes: every answer's next token, and chunks of prompts as far as they fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tritgguf.generation.request import RunningRequest


@dataclass(frozen=True)
class Budget:
    """How many tokens a forward pass takes at most.

    A prompt is cut into chunks, so that answers that are being generated go on meanwhile: a chunk delays each of them
    by the time that it takes.
    """

    tokens: int = 512
    outputs: int = 128
    """Logits of one prompt in a pass: a row of them has as many numbers as the vocabulary has tokens."""
    prompt_tokens_beside_answers: int = 48
    """Tokens of prompts in a pass that also generates: about a second of a model of 1.5B parameters on two cores."""
    share_of_oldest: float = 0.25
    """What the prompt that was admitted first is sure of; all others get the rest, those that end soonest first."""


@dataclass(frozen=True)
class Chunk:
    """Some tokens of a request.

    Attributes:
        request: whose they are.
        tokens: how many.
        is_prompt: whether they are the prompt's.
        outputs: how many of the last ones have outputs.
        draft: the last ones, where they are a guess of what comes next.

    """

    request: RunningRequest
    tokens: int
    is_prompt: bool
    outputs: int
    draft: tuple[int, ...] = ()

    def without_draft(self) -> Chunk:
        """Return the chunk of the request's own tokens."""
        return replace(self, tokens=self.tokens - len(self.draft), outputs=self.outputs - len(self.draft), draft=())


def plan(running: Sequence[RunningRequest], budget: Budget) -> list[Chunk]:
    """Return the chunks of the next forward pass, those of prompts first, each kind in the order of `running`."""
    generating = [request for request in running if not request.is_prompt]
    chunks, left = list[Chunk](), budget.tokens
    for request in generating:
        if left > 0:
            count = min(request.pending, left)
            chunks.append(_chunk(request, count))
            left -= count
    if generating:
        left = min(left, budget.prompt_tokens_beside_answers)
    return _prompt_chunks([request for request in running if request.is_prompt], left, budget) + chunks


def _prompt_chunks(reading: Sequence[RunningRequest], left: int, budget: Budget) -> list[Chunk]:
    """Share `left` tokens among prompts; return their chunks in the order of `reading`.

    The prompts that end soonest come first, so that a short one does not wait for a long one. The oldest has a share
    that nobody takes, so it goes on whatever arrives; each prompt becomes the oldest at some time.
    """
    most = {request: _most_tokens(request, budget) for request in reading}
    counts = dict.fromkeys(reading, 0)
    if reading and left:
        oldest = reading[0]
        counts[oldest] = min(most[oldest], max(1, int(left * budget.share_of_oldest)))
        left -= counts[oldest]
    for request in sorted(reading, key=lambda request: request.pending):
        more = min(most[request] - counts[request], left)
        counts[request] += more
        left -= more
    return [_chunk(request, count) for request, count in counts.items() if count]


def _most_tokens(request: RunningRequest, budget: Budget) -> int:
    """Return how many tokens of a prompt a pass may take."""
    if request.request.wanted == "tokens":
        return request.pending
    without_output = max(0, request.request.first_output - request.evaluated)
    return min(request.pending, without_output + budget.outputs)


def _chunk(request: RunningRequest, count: int) -> Chunk:
    end = request.evaluated + count
    if request.request.wanted == "tokens":
        outputs = int(end == len(request.tokens))  # the last token's logits give the next one
    else:
        outputs = max(0, min(count, end - request.request.first_output))
    return Chunk(request, count, request.is_prompt, outputs)

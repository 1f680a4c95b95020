"""Which tokens the next forward pass takes: every answer's next token, and chunks of prompts as far as they fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tritgguf.generation.request import RunningRequest


@dataclass(frozen=True)
class Budget:
    """How many tokens a forward pass takes at most.

    A prompt is cut into chunks, so that answers that are being generated go on meanwhile: a chunk delays each of them
    by the time that it takes.
    """

    tokens: int = 512
    outputs: int = 128
    """Tokens of a prompt whose logits are wanted: a row of them has as many numbers as the vocabulary has tokens."""
    prompt_tokens_beside_answers: int = 48
    """Tokens of prompts in a pass that also generates: about a second of a model of 1.5B parameters on two cores."""


@dataclass(frozen=True)
class Chunk:
    """Some tokens of a request: how many, whether of its prompt, and how many of the last ones have outputs."""

    request: RunningRequest
    tokens: int
    is_prompt: bool
    outputs: int


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
    prompts = list[Chunk]()
    for request in running:
        if request.is_prompt and left > 0:
            most = left if request.request.wanted == "tokens" else min(left, budget.outputs)
            count = min(request.pending, most)
            prompts.append(_chunk(request, count))
            left -= count
    return prompts + chunks


def _chunk(request: RunningRequest, count: int) -> Chunk:
    end = request.evaluated + count
    if request.request.wanted == "tokens":
        outputs = int(end == len(request.tokens))  # the last token's logits give the next one
    else:
        outputs = max(0, min(count, end - request.request.first_output))
    return Chunk(request, count, request.is_prompt, outputs)

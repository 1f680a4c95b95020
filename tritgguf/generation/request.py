"""What an engine is asked for, and the state of a request while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from tritgguf.errors import ContextFullError
from tritgguf.generation.result import FinishReason


class TokenChooser(Protocol):
    """Chooses generated tokens; `Sampler` is one."""

    def accept(self, tokens: Iterable[int]) -> None:
        """Take note of tokens of the text, in its order: the prompt's first, then each one chosen."""

    def sample(self, logits: np.ndarray) -> int:
        """Return the next token for float32 logits [vocabulary], which stay as they are."""


Wanted = Literal["tokens", "logits", "hidden"]


@dataclass(frozen=True)
class Request:
    """A prompt, and what is wanted of it.

    Attributes:
        prompt: token ids, at least one.
        sampler: chooses generated tokens; None where none are wanted.
        max_tokens: how many tokens to generate at most; None for as many as fit into the context.
        stop_tokens: tokens that end the generation; they are not part of it.
        wanted: generated tokens, or the logits or hidden states of the prompt's tokens.
        first_output: where logits or hidden states begin: those of the tokens before are not wanted.
        reduce_outputs: what to keep of output rows instead of the rows: takes float32 [rows, width] and the position in
            the prompt of the first one, returns an array of as many rows; None keeps them as they are.
        cache_prompt: whether keys and values of an equal beginning are taken over, and these kept for later requests.
        keep_prompt: whether they are kept, where `cache_prompt` is true.

    """

    prompt: list[int]
    sampler: TokenChooser | None = None
    max_tokens: int | None = None
    stop_tokens: frozenset[int] = frozenset()
    wanted: Wanted = "tokens"
    first_output: int = 0
    reduce_outputs: Callable[[np.ndarray, int], np.ndarray] | None = None
    cache_prompt: bool = True
    keep_prompt: bool = True


@dataclass(eq=False)
class RunningRequest:
    """A request in an engine: its tokens so far, and how far they are evaluated.

    Attributes:
        tokens: the prompt's, then the generated ones.
        evaluated: how many of them have their keys and values stored.
        cached: how many of the prompt's were taken over from an earlier request.
        computed_as_prompt: how many tokens, from the first on, have keys and values that were computed as a prompt's.
        drafted_tokens: how many tokens of drafts were evaluated.
        accepted_tokens: how many of those the sampler has chosen too.
        sequence: its number in the `KVPool`; None while it waits.
        cancelled: whether nobody wants it any more; any thread may say so.
        state_marks: after so many tokens its state is copied, or was -> the copy, see `StateMarks`.
        generated: tokens that nobody has fetched yet.
        outputs: logits or hidden states, float32 [tokens, width], or what `reduce_outputs` makes of them; None before
            the first.

    """

    request: Request
    tokens: list[int]
    evaluated: int = 0
    cached: int = 0
    computed_as_prompt: int = 0
    evaluated_prompt_tokens: int = 0
    decoded_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    sequence: int | None = None
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    cancelled: bool = False
    state_marks: dict[int, int] = field(default_factory=dict)
    generated: deque[int] = field(default_factory=deque)
    outputs: np.ndarray | None = None

    @property
    def prompt_length(self) -> int:
        """Number of the prompt's tokens."""
        return len(self.request.prompt)

    @property
    def is_prompt(self) -> bool:
        """Whether the next token to evaluate is one of the prompt."""
        return self.evaluated < self.prompt_length

    @property
    def pending(self) -> int:
        """How many tokens of the next kind, of the prompt or generated, are to be evaluated."""
        return (self.prompt_length if self.is_prompt else len(self.tokens)) - self.evaluated

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.cancelled or self.finish_reason is not None or self.error is not None


def check_prompt_length(tokens: int, context: int) -> None:
    """Raise ContextFullError if a prompt of so many tokens does not fit into the context."""
    if tokens > context:
        raise ContextFullError(
            f"the prompt has {tokens} tokens, the context holds {context};"
            " shorten it or choose a larger context (--ctx-size, context=)"
        )

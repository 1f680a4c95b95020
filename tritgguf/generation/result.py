"""The result of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Timings:
    """Seconds and token counts of one generation; tokens that were in the cache already do not count as prompt."""

    load_seconds: float
    prompt_tokens: int
    prompt_seconds: float
    decode_tokens: int
    decode_seconds: float
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were stored already."""
    drafted_tokens: int = 0
    """Tokens that speculation guessed and the model evaluated; they do not count as decoded."""
    accepted_tokens: int = 0
    """Those that were right; they count as decoded."""

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of the prompt's evaluation."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of generation, sampling included."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the guessed tokens that were right."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @classmethod
    def total(cls, parts: Sequence[Timings]) -> Timings:
        """Add up the generations of one loaded model."""
        return cls(
            load_seconds=parts[0].load_seconds,
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            prompt_seconds=sum(part.prompt_seconds for part in parts),
            decode_tokens=sum(part.decode_tokens for part in parts),
            decode_seconds=sum(part.decode_seconds for part in parts),
            cached_tokens=sum(part.cached_tokens for part in parts),
            drafted_tokens=sum(part.drafted_tokens for part in parts),
            accepted_tokens=sum(part.accepted_tokens for part in parts),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what `run --json` prints."""
        return {
            **vars(self),
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "acceptance_rate": self.acceptance_rate,
        }


@dataclass(frozen=True)
class Generation:
    """A generated text, its tokens, and why it ended.

    `finish_reason`: "stop" (the model ended it), "length" (max_tokens), "context" (no room left),
    "interrupted".
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: list[int]
    seed: int
    timings: Timings


@dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation of a prompt.

    Attributes:
        tokens: the continuation's.
        log_probabilities: natural logarithms, one for each token.
        is_greedy: whether every token is the likeliest one in its place.

    """

    tokens: list[int]
    log_probabilities: list[float]
    is_greedy: bool

    @property
    def log_probability(self) -> float:
        """Natural logarithm of the probability of the whole continuation."""
        return sum(self.log_probabilities)

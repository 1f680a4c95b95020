"""Two models on the same tokens: KL divergence, top-1 agreement, perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from tritgguf.errors import TritGgufError

_CHUNK_ROWS = 32  # 32 rows of 151,936 float64 values are 39 MB


@dataclass(frozen=True)
class Comparison:
    """A model and its reference on the same positions, in nats."""

    kl: np.ndarray
    """float64 [positions]: KL(reference || model)."""
    same_top: np.ndarray
    """bool [positions]: whether both give the same token the largest logit."""
    surprise: np.ndarray
    """float64 [positions with a next token]: the model's negative log-probability of that token."""
    surprise_reference: np.ndarray
    """The same of the reference."""

    @property
    def kl_mean(self) -> float:
        """Mean divergence."""
        return float(self.kl.mean())

    @property
    def kl_p99(self) -> float:
        """99th percentile of the divergence, interpolated linearly between two positions."""
        return float(np.percentile(self.kl, 99))

    @property
    def top1_agreement(self) -> float:
        """Share of positions with the same top token."""
        return float(self.same_top.mean())

    @property
    def perplexity(self) -> float:
        """The model's perplexity: e to the mean surprise."""
        return _perplexity(self.surprise)

    @property
    def perplexity_reference(self) -> float:
        """The reference's perplexity."""
        return _perplexity(self.surprise_reference)

    def as_dict(self) -> dict[str, float]:
        """Return the means and shares by their names."""
        names = ("kl_mean", "kl_p99", "top1_agreement", "perplexity", "perplexity_reference")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def concatenate(cls, parts: Sequence[Comparison]) -> Comparison:
        """Join comparisons of several windows."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def _perplexity(surprise: np.ndarray) -> float:
    # The bound keeps a wrecked model's value finite: JSON has no infinity.
    return math.exp(min(float(surprise.mean()), 700.0))


def compare_logits(reference: np.ndarray, logits: np.ndarray, next_tokens: Sequence[int]) -> Comparison:
    """Compare a model's logits with the reference's, both [positions, vocabulary], in float64.

    `next_tokens` are the tokens that follow the first positions; there may be fewer of them than positions.
    Raises TritGgufError when a logit is infinite or not a number.
    """
    parts = []
    following = np.asarray(next_tokens, dtype=np.int64)
    for first in range(0, len(reference), _CHUNK_ROWS):
        rows = slice(first, first + _CHUNK_ROWS)
        log_p, log_q = log_softmax(reference[rows]), log_softmax(logits[rows])
        chosen = following[rows]
        index = np.arange(len(chosen))
        parts.append(
            Comparison(
                # Rounding may leave a divergence of zero a hair below it.
                kl=np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0),
                same_top=reference[rows].argmax(axis=1) == logits[rows].argmax(axis=1),
                surprise=-log_q[index, chosen],
                surprise_reference=-log_p[index, chosen],
            )
        )
    return Comparison.concatenate(parts)


def compare_windows(
    windows: Sequence[Sequence[int]], reference: Iterable[np.ndarray], logits: Iterable[np.ndarray]
) -> Comparison:
    """Compare a model's logits with the reference's on windows of tokens; both are [tokens, vocabulary] by window.

    Raises TritGgufError when a logit is infinite or not a number.
    """
    return Comparison.concatenate(
        [
            compare_logits(expected, found, window[1:])
            for window, expected, found in zip(windows, reference, logits, strict=True)
        ]
    )


def largest_difference(reference: np.ndarray, logits: np.ndarray) -> float:
    """Return the largest difference of two logits, of arrays [positions, vocabulary]."""
    chunks = (slice(first, first + _CHUNK_ROWS) for first in range(0, len(reference), _CHUNK_ROWS))
    return max(float(np.abs(logits[rows] - reference[rows]).max()) for rows in chunks)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of every row, in float64; TritGgufError when a logit is not finite."""
    values = logits.astype(np.float64)
    largest = values.max(axis=1, keepdims=True)
    if not (np.isfinite(largest).all() and np.isfinite(values.min())):
        raise TritGgufError("a logit is infinite or not a number: one of the two models overflows on this text")
    values -= largest
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))

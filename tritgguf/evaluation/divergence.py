"""Compare two models on the same tokens: KL divergence, top-1 agreement, perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from tritgguf.generation.log_softmax import log_softmax

_CHUNK_VALUES = 1 << 18  # logits that are compared at once: their float64 values fit into a processor's cache


@dataclass(frozen=True)
class Comparison:
    """Measures of a model and its reference at the same positions, in nats."""

    kl: np.ndarray
    """float64 [positions]: KL(reference || model)."""
    same_top: np.ndarray
    """bool [positions]: whether both have the same most likely token."""
    nll: np.ndarray
    """float64 [positions with a next token]: the model's negative log-probability of that token."""
    nll_reference: np.ndarray
    """The same for the reference."""

    @property
    def kl_mean(self) -> float:
        """Mean KL divergence."""
        return float(self.kl.mean())

    @property
    def kl_p99(self) -> float:
        """99th percentile of the KL divergence, with linear interpolation between two positions."""
        return float(np.percentile(self.kl, 99))

    @property
    def top1_agreement(self) -> float:
        """Fraction of positions with the same most likely token."""
        return float(self.same_top.mean())

    @property
    def perplexity(self) -> float:
        """The model's perplexity: exp of the mean negative log-likelihood."""
        return _perplexity(self.nll)

    @property
    def perplexity_reference(self) -> float:
        """The reference's perplexity."""
        return _perplexity(self.nll_reference)

    def as_dict(self) -> dict[str, float]:
        """Return the summary measures by name."""
        names = ("kl_mean", "kl_p99", "top1_agreement", "perplexity", "perplexity_reference")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def concatenate(cls, parts: Sequence[Comparison]) -> Comparison:
        """Concatenate the comparisons of several windows."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def _perplexity(nll: np.ndarray) -> float:
    # The bound keeps the perplexity of a broken model finite, because JSON has no infinity.
    return math.exp(min(float(nll.mean()), 700.0))


def compare_logits(reference: np.ndarray, logits: np.ndarray, next_tokens: Sequence[int]) -> Comparison:
    """Compare a model's logits with the reference's, both [positions, vocabulary], in float64.

    `next_tokens` are the next tokens of the first positions; there may be fewer of them than positions.
    Raises TritGgufError if a logit is NaN or infinite.
    """
    parts = []
    following = np.asarray(next_tokens, dtype=np.int64)
    for rows in _chunks(reference):
        log_p, log_q = log_softmax(reference[rows]), log_softmax(logits[rows])
        chosen = following[rows]
        index = np.arange(len(chosen))
        parts.append(
            Comparison(
                # Rounding may make a divergence of zero slightly negative.
                kl=np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0),
                same_top=reference[rows].argmax(axis=1) == logits[rows].argmax(axis=1),
                nll=-log_q[index, chosen],
                nll_reference=-log_p[index, chosen],
            )
        )
    return Comparison.concatenate(parts)


def compare_windows(
    windows: Sequence[Sequence[int]], reference: Iterable[np.ndarray], logits: Iterable[np.ndarray]
) -> Comparison:
    """Compare a model's logits with the reference's on windows of tokens, both [tokens, vocabulary] per window.

    Raises TritGgufError if a logit is NaN or infinite.
    """
    return Comparison.concatenate(
        [
            compare_logits(expected, found, window[1:])
            for window, expected, found in zip(windows, reference, logits, strict=True)
        ]
    )


def largest_difference(reference: np.ndarray, logits: np.ndarray) -> float:
    """Return the largest absolute difference of logits, for arrays [positions, vocabulary]."""
    return max(float(np.abs(logits[rows] - reference[rows]).max()) for rows in _chunks(reference))


def _chunks(logits: np.ndarray) -> Iterator[slice]:
    """Yield the slices of rows that are compared at once."""
    count = max(1, _CHUNK_VALUES // logits.shape[1])
    return (slice(first, first + count) for first in range(0, len(logits), count))

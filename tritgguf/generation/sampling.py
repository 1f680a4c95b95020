"""The choice of the next token: llama.cpp's samplers, in its order and with its defaults.

Repeat penalty, top-k, top-p, min-p, temperature, then a draw. Only the tokens that survive top-k are sorted
and exponentiated, and none are sorted where all may be drawn, so a vocabulary of 150,000 costs little more than one
pass over its logits.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, TypedDict

import numpy as np

from tritgguf.errors import BadRequestError, DamagedFileError

_SET = 64  # logits whose maximum is taken at once


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; the defaults are llama.cpp's. Raises BadRequestError for impossible values.

    temperature: 0 always takes the likeliest token, higher is wilder.
    top_k: keep the k likeliest tokens; 0 or less keeps all.
    top_p: keep the smallest set of tokens that has this probability; 1 keeps all.
    min_p: keep tokens at least this probable compared with the likeliest; 0 keeps all.
    repeat_penalty: what logits of recent tokens are divided by (multiplied, if negative); 1 does nothing.
    repeat_last_n: how many tokens are recent.
    seed: of the random draw; -1 takes a new one each time.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = -1

    def __post_init__(self) -> None:
        for option in fields(self):
            value, is_whole = getattr(self, option.name), option.type == "int"
            name, kind = option.name.replace("_", "-"), Integral if is_whole else Real
            _require(isinstance(value, kind), name, "a whole number" if is_whole else "a number", value)
        temperature, penalty = self.temperature, self.repeat_penalty
        _require(math.isfinite(temperature) and temperature >= 0, "temperature", "0 or more", temperature)
        _require(0 <= self.top_p <= 1, "top-p", "between 0 and 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min-p", "between 0 and 1", self.min_p)
        _require(math.isfinite(penalty) and penalty > 0, "repeat-penalty", "more than 0", penalty)
        _require(0 <= self.repeat_last_n < 1 << 31, "repeat-last-n", "0 or more", self.repeat_last_n)
        _require(self.seed >= -1, "seed", "0 or more, or -1 for a new one each time", self.seed)


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingOptions`, as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    seed: int


def sampling_options(sampling: SamplingOptions | None, options: Mapping[str, Any]) -> SamplingOptions:
    """Return sampling options with some of them replaced by name; None stands for the default.

    Raises BadRequestError for a name that is none of theirs.
    """
    names = [field.name for field in fields(SamplingOptions)]
    for name in options:
        if name not in names:
            raise BadRequestError(f"there is no option {name}; the sampling options are {', '.join(names)}")
    if not isinstance(sampling, SamplingOptions | None):
        raise BadRequestError(f"sampling must be SamplingOptions, not {sampling!r:.60}")
    given = {name: value for name, value in options.items() if value is not None}
    return replace(sampling or SamplingOptions(), **given)


def _require(condition: bool, option: str, expected: str, value: Any) -> None:
    if not condition:
        raise BadRequestError(f"{option} must be {expected}, not {value!r:.60}")


class Sampler:
    """Draws tokens; remembers the recent ones, for the penalty, and where it is in its random numbers.

    `seed` is the draw's, also where the options leave it open.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self.seed = int.from_bytes(os.urandom(4), "little") if options.seed == -1 else options.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._recent: deque[int] = deque(maxlen=options.repeat_last_n)

    def accept(self, tokens: Iterable[int]) -> None:
        """Remember tokens of the text, in its order: the prompt's first, then each one drawn."""
        self._recent.extend(tokens)

    def sample(self, logits: np.ndarray) -> int:
        """Return the next token for float32 logits [vocab_size], which stay as they are.

        Raises DamagedFileError when the logits are not numbers.
        """
        logits = self._penalized(logits)
        largest = logits.max()
        if not math.isfinite(largest):  # the maximum of anything with a NaN in it is NaN
            raise DamagedFileError("the model computes no numbers: its file is damaged, fetch or convert it again")
        if self.options.temperature == 0 or self.options.top_k == 1:
            return int(np.argmax(logits))
        if self.options.top_k <= 0 and self.options.top_p == 1 and self.options.min_p == 0:
            return self._draw(np.exp((logits - largest) / np.float32(self.options.temperature)))
        tokens, probabilities = self.distribution(logits)
        return int(tokens[self._draw(probabilities)])

    def _draw(self, weights: np.ndarray) -> int:
        """Return a place, each as probable as its weight says."""
        cumulative = np.cumsum(weights, dtype=np.float64)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return min(int(drawn), len(weights) - 1)

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that may be drawn, likeliest first, and their probabilities (float64, sum 1).

        `logits` are those after the penalty; the temperature is not 0.
        """
        tokens = _likeliest(logits, self.options.top_k)
        kept = logits[tokens].astype(np.float64)
        if self.options.top_p < 1:
            cumulative = np.cumsum(_softmax(kept))
            # Rounding can leave the whole sum below top_p; the slice then keeps everything.
            kept = kept[: np.searchsorted(cumulative, self.options.top_p) + 1]
        if self.options.min_p > 0:
            kept = kept[kept >= kept[0] + math.log(self.options.min_p)]
        return tokens[: len(kept)], _softmax((kept - kept[0]) / self.options.temperature)

    def _penalized(self, logits: np.ndarray) -> np.ndarray:
        penalty = self.options.repeat_penalty
        if penalty == 1 or not self._recent:
            return logits
        logits = logits.copy()
        recent = np.array(sorted(set(self._recent)))
        values = logits[recent]
        logits[recent] = np.where(values > 0, values / penalty, values * penalty)
        return logits


def _likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """Return the tokens of the `count` largest logits (0 or less: of all), largest first."""
    if not 0 < count < len(logits) // _SET:
        order = np.argsort(-logits, kind="stable")
        return order[:count] if count > 0 else order
    # As many sets as tokens are wanted have a maximum of at least the threshold, and so do all wanted tokens.
    maxima = logits[: len(logits) // _SET * _SET].reshape(_SET, -1).max(axis=0)
    tokens = np.flatnonzero(logits >= np.partition(maxima, -count)[-count])
    return tokens[np.argsort(-logits[tokens], kind="stable")[:count]]


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights: np.ndarray = np.exp(logits - logits[0])
    weights /= weights.sum()
    return weights

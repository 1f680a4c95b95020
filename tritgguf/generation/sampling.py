"""The choice of the next token: llama.cpp's samplers, in its order and with its defaults.

Logit bias, penalties, the constraint's mask, top-k, top-p, min-p, temperature, then a draw. Only the tokens that
survive top-k are sorted and exponentiated, and none are sorted where all may be drawn, so a vocabulary of 150,000
costs little more than one pass over its logits.
"""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from tritgguf.errors import BadRequestError, DamagedFileError

if TYPE_CHECKING:
    from tritgguf.generation.grammar import TokenConstraint

_SET = 64  # logits whose maximum is taken at once
_SUMMED = 256  # weights whose sum is taken at once: adding them one after the other takes five times as long
_BANNED = -100  # a logit bias of this bans its token, as in OpenAI's API
_LOWEST = np.finfo(np.float32).min
_LARGEST = 1e30  # of penalized logits, so that their differences are numbers
_SMALLEST_TEMPERATURE = 1e-6  # below, the likeliest token is all but certain


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; the defaults are llama.cpp's. Raises BadRequestError for impossible values.

    temperature: 0 always takes the likeliest token, higher is wilder.
    top_k: keep the k likeliest tokens; 0 or -1 keeps all.
    top_p: keep the smallest set of tokens that has this probability; 1 keeps all.
    min_p: keep tokens at least this probable compared with the likeliest; 0 keeps all.
    repeat_penalty: what logits of recent tokens are divided by (multiplied, if negative); 1 does nothing.
    repeat_last_n: how many tokens are recent; -1: all of them.
    seed: of the random draw; -1 takes a new one each time.
    presence_penalty: what is subtracted from the logits of tokens that the answer has; 0 does nothing.
    frequency_penalty: what is subtracted from them for each time that the answer has them; 0 does nothing.
    logit_bias: what is added to the logits of tokens, by token id, from -100 to 100; -100 bans the token.

    Presence and frequency count the whole answer and not the prompt, as in OpenAI's API and vLLM; llama.cpp counts
    the last `repeat_last_n` tokens, those of the prompt included.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = -1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for option in fields(self):
            value, name = getattr(self, option.name), option.name.replace("_", "-")
            if option.type == "int":
                _require(isinstance(value, Integral), name, "a whole number", value)
            elif option.type == "float":
                _require(isinstance(value, Real), name, "a number", value)
        temperature, penalty = self.temperature, self.repeat_penalty
        _require(math.isfinite(temperature) and temperature >= 0, "temperature", "0 or more", temperature)
        _require(0 <= self.top_p <= 1, "top-p", "between 0 and 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min-p", "between 0 and 1", self.min_p)
        _require(math.isfinite(penalty) and penalty > 0, "repeat-penalty", "more than 0", penalty)
        _require(-1 <= self.repeat_last_n < 1 << 31, "repeat-last-n", "0 or more, or -1 for all", self.repeat_last_n)
        _require(self.top_k >= -1, "top-k", "1 or more, or 0 or -1 for all", self.top_k)
        _require(self.seed >= -1, "seed", "0 or more, or -1 for a new one each time", self.seed)
        _require(math.isfinite(self.presence_penalty), "presence-penalty", "a finite number", self.presence_penalty)
        _require(math.isfinite(self.frequency_penalty), "frequency-penalty", "a finite number", self.frequency_penalty)
        _require(_is_bias(self.logit_bias), "logit-bias", "numbers from -100 to 100 by token id", self.logit_bias)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    def check_vocabulary(self, size: int) -> None:
        """Raise BadRequestError if `logit_bias` names a token that a vocabulary of `size` tokens does not have."""
        if self.logit_bias and max(self.logit_bias) >= size:
            raise BadRequestError(f"logit-bias names token {max(self.logit_bias)}, the model has {size} tokens")


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingOptions`, as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    seed: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]


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


def _is_bias(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(token, Integral) for token in value):
        return False
    if not all(isinstance(bias, Real) for bias in value.values()):
        return False
    return all(token >= 0 and -100 <= bias <= 100 for token, bias in value.items())


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities in the place of one sampled token.

    They are those of the model: before bias, penalties, constraint and temperature, as in vLLM and llama-server.

    Attributes:
        token: the token that was sampled.
        logprob: its own.
        top: the likeliest tokens with theirs, likeliest first.

    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws the tokens of an answer, or of one answer after another.

    Attributes:
        options: how tokens are chosen.
        seed: of the draw, also where the options leave it open.
        constraint: which tokens may come; it is for one answer, so another answer needs another one.
        logprobs: one for each token that was sampled, stop tokens included; empty unless `top_logprobs` was given.

    """

    def __init__(
        self,
        options: SamplingOptions,
        *,
        constraint: TokenConstraint | None = None,
        top_logprobs: int | None = None,
    ) -> None:
        """Begin; `accept` the prompt first.

        Args:
            options: how tokens are chosen.
            constraint: which tokens may come.
            top_logprobs: how many of the likeliest tokens `logprobs` lists, 0 or more; None keeps no logprobs.

        """
        _require(top_logprobs is None or top_logprobs >= 0, "top-logprobs", "0 or more", top_logprobs)
        self.options = options
        self.seed = int.from_bytes(os.urandom(4), "little") if options.seed == -1 else options.seed
        self.logprobs: list[TokenLogprobs] = []
        self.constraint, self._top_logprobs = constraint, top_logprobs
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._recent: deque[int] = deque(maxlen=None if options.repeat_last_n == -1 else options.repeat_last_n)
        self._counts = Counter[int]()  # of the tokens of this answer
        self._sampled: int | None = None  # what `sample` has returned, until `accept` receives it
        self._biased = np.array(list(options.logit_bias), np.int64)
        biases = np.array(list(options.logit_bias.values()), np.float32)
        self._biases = np.where(biases <= _BANNED, np.float32(-np.inf), biases)

    def accept(self, tokens: Iterable[int]) -> None:
        """Remember tokens of the text, in its order: the prompt's first, then each one that was sampled."""
        tokens = list(tokens)
        self._recent.extend(tokens)
        if tokens != [self._sampled]:  # a prompt: another answer begins
            self._counts.clear()
            return
        self._counts.update(tokens)
        if self.constraint is not None:
            self.constraint.accept(tokens[0])
        self._sampled = None

    def sample(self, logits: np.ndarray) -> int:
        """Return the next token for float32 logits [vocab_size], which stay as they are.

        Raises DamagedFileError when the logits are not numbers, and BadRequestError when the options and the
        constraint leave no token.
        """
        if not math.isfinite(logits.max()):  # the maximum of anything with a NaN in it is NaN
            raise DamagedFileError("the model computes no numbers: its file is damaged, fetch or convert it again")
        token = self._choose(self._constrained(self._adjusted(logits)))
        if self._top_logprobs is not None:
            self.logprobs.append(token_logprobs(logits, token, self._top_logprobs))
        self._sampled = token
        return token

    def _choose(self, logits: np.ndarray) -> int:
        likeliest = int(np.argmax(logits))
        if logits[likeliest] == -np.inf:
            raise BadRequestError("the logit bias bans every token that may come; ban fewer")
        if self.options.temperature == 0 or self.options.top_k == 1:
            return likeliest
        if self.options.top_k <= 0 and self.options.top_p == 1 and self.options.min_p == 0:
            return self._draw(np.exp((logits - logits[likeliest]) / np.float32(self._temperature)))
        tokens, probabilities = self.distribution(logits)
        return int(tokens[self._draw(probabilities)])

    @property
    def _temperature(self) -> float:
        return max(self.options.temperature, _SMALLEST_TEMPERATURE)

    def _draw(self, weights: np.ndarray) -> int:
        """Return a place, each as probable as its weight says."""
        whole = len(weights) // _SUMMED * _SUMMED
        sums = [weights[:whole].reshape(-1, _SUMMED).sum(1), weights[whole:].sum(keepdims=True)]
        cumulative = np.cumsum(np.concatenate(sums), dtype=np.float64)
        drawn = self._random.random() * cumulative[-1]
        part = _place(cumulative, drawn)
        first, before = part * _SUMMED, cumulative[part - 1] if part else 0.0
        return first + _place(np.cumsum(weights[first : first + _SUMMED], dtype=np.float64), drawn - before)

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that may be drawn, likeliest first, and their probabilities (float64, sum 1).

        `logits` are those after penalties and constraint, -inf for what must not come; the temperature is not 0.
        """
        tokens = _likeliest(logits, self.options.top_k)
        kept = logits[tokens].astype(np.float64)
        if self.options.top_p < 1:
            cumulative = np.cumsum(_softmax(kept))
            # Rounding can leave the whole sum below top_p; the slice then keeps everything.
            kept = kept[: np.searchsorted(cumulative, self.options.top_p) + 1]
        if self.options.min_p > 0:
            kept = kept[kept >= kept[0] + math.log(self.options.min_p)]
        return tokens[: len(kept)], _softmax((kept - kept[0]) / self._temperature)

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """Return the logits with bias and penalties: a copy, or the same array if there are none."""
        self.options.check_vocabulary(len(logits))
        options = self.options
        repeats = options.repeat_penalty != 1 and bool(self._recent)
        counts = bool(options.presence_penalty or options.frequency_penalty) and bool(self._counts)
        if not (repeats or counts or len(self._biased)):
            return logits
        logits = logits.copy()
        logits[self._biased] += self._biases
        if repeats:
            recent = np.array(sorted(set(self._recent)))
            values = logits[recent].astype(np.float64)
            with np.errstate(divide="ignore", over="ignore"):  # penalties may have any size
                values = np.where(values > 0, values / options.repeat_penalty, values * options.repeat_penalty)
            logits[recent] = _finite(values, logits[recent])
        if counts:
            tokens, times = np.array(list(self._counts)), np.array(list(self._counts.values()))
            with np.errstate(over="ignore"):
                values = logits[tokens] - (options.presence_penalty + options.frequency_penalty * times)
            logits[tokens] = _finite(values, logits[tokens])
        return logits

    def _constrained(self, logits: np.ndarray) -> np.ndarray:
        """Return the logits with -inf for what the constraint forbids, or the same array if nothing is forbidden."""
        return logits if self.constraint is None else logits + self.constraint.mask()


def token_logprobs(logits: np.ndarray, token: int, top: int) -> TokenLogprobs:
    """Return the log probabilities of a token and of the `top` likeliest, for logits [vocabulary]."""
    largest = logits.max()
    log_sum = float(largest) + math.log(np.exp(logits - largest).sum(dtype=np.float64))
    likeliest = _likeliest(logits, top).tolist() if top else []
    pairs = ((other, float(logits[other]) - log_sum) for other in likeliest)
    return TokenLogprobs(token, float(logits[token]) - log_sum, tuple(pairs))


def _finite(values: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return penalized logits within bounds; what was banned before stays banned."""
    return np.where(before < _LOWEST, before, np.clip(values, -_LARGEST, _LARGEST))


def _place(cumulative: np.ndarray, drawn: float) -> int:
    """Return where a number falls between growing sums; never where nothing was added, even if rounding says so."""
    return int(min(np.searchsorted(cumulative, drawn, side="right"), np.searchsorted(cumulative, cumulative[-1])))


def _likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """Return the tokens of the `count` largest logits (0 or less: of all), largest first, without those of -inf."""
    if not 0 < count < len(logits) // _SET:
        tokens = np.flatnonzero(logits >= _LOWEST)
        tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
        return tokens[:count] if count > 0 else tokens
    # As many sets as tokens are wanted have a maximum of at least the threshold, and so do all wanted tokens.
    maxima = logits[: len(logits) // _SET * _SET].reshape(_SET, -1).max(axis=0)
    tokens = np.flatnonzero(logits >= max(np.partition(maxima, -count)[-count], _LOWEST))
    return tokens[np.argsort(-logits[tokens], kind="stable")[:count]]


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights: np.ndarray = np.exp(logits - logits[0])
    weights /= weights.sum()
    return weights

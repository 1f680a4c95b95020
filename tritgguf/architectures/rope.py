"""Rotary embedding: frequencies from GGUF's keys, and the frequency factors of Llama 3 and of LongRoPE.

`rope_keys` translates between config.json and GGUF's keys. The scalings are computed as in transformers (linear: Chen
et al., arXiv:2306.15595; YaRN: Peng et al., arXiv:2309.00071; LongRoPE: Ding et al., arXiv:2402.13753; Llama 3.1's
scaling has no paper).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tritgguf.errors import TritGgufError
from tritgguf.formats.checked import positive_number

ROPE_FREQS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
LONG_ROPE_TENSORS = (LONG_FACTORS, SHORT_FACTORS)
FACTOR_TENSORS = (ROPE_FREQS, *LONG_ROPE_TENSORS)
"""Tensors that a Hugging Face checkpoint has in its config.json: float32 [head_dim / 2], divisors of frequencies."""
BASE_KEY = "rope.freq_base"
SLIDING_BASE_KEY = "rope.freq_base_swa"
DEFAULT_BASE = 10000.0
TYPE_KEY = "rope.scaling.type"
FACTOR_KEY = "rope.scaling.factor"
ORIGINAL_KEY = "rope.scaling.original_context_length"
ATTENTION_FACTOR_KEY = "rope.scaling.attn_factor"
"""LongRoPE's; YaRN's has a name of its own."""
YARN_KEYS = {
    "extrapolation_factor": "rope.scaling.yarn_ext_factor",
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
"""config.json's name -> GGUF's."""
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of a layer's queries and keys.

    Attributes:
        frequencies: float64 [head_dim / 2], radians per position of each pair; zeros mean no rotation.
        attention_factor: queries and keys are also multiplied by this (YaRN, LongRoPE).

    """

    frequencies: np.ndarray
    attention_factor: float = 1.0


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray | None:
    """Return `rope_freqs.weight` if the model has Llama 3's rope scaling, else None.

    float32 [head_dim / 2]: divisors of the pairs' frequencies. Wavelengths below original context / `high_freq_factor`
    have the divisor 1, those above original context / `low_freq_factor` have `factor`. In between, the reciprocal of
    the divisor is linear in the number of turns per original context (Llama 3.1).
    """
    if rope["rope_type"] != "llama3":
        return None
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1.0 / np.float32(rope["rope_theta"]) ** exponents
    turns = rope["original_max_position_embeddings"] * frequencies.astype(np.float64) / (2 * math.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - share) / factor + share)).astype(np.float32)


def long_rope_attention_factor(context: float, original: int) -> float:
    """Return what LongRoPE multiplies queries and keys with, unless a checkpoint says otherwise."""
    return math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original > 1 else 1.0


def rotation_from_metadata(metadata: Mapping[str, Any], head_dim: int, where: str, *, truncates: bool) -> Rotation:
    """Return the rotation from a GGUF model's keys, without the factors in `FACTOR_TENSORS`.

    `truncates` says whether YaRN's range of pairs is rounded to whole pairs, which GGUF has no key for. Raises
    TritGgufError for a scaling other than linear and YaRN, and for a value that is not a positive number.
    """
    arch = metadata["general.architecture"]

    def number(key: str, default: float | None = None) -> float:
        name = f"{arch}.{key}"
        return positive_number(metadata.get(name, default), name, where)

    base = number(BASE_KEY, DEFAULT_BASE)
    frequencies = _frequencies(base, head_dim)
    scaling = metadata.get(f"{arch}.{TYPE_KEY}", "none")
    if scaling == "none":
        return Rotation(frequencies, number(ATTENTION_FACTOR_KEY, 1.0))
    factor = number(FACTOR_KEY)
    if scaling == "linear":
        return Rotation(frequencies / factor)
    if scaling != "yarn":
        raise TritGgufError(f"{where}: rope scaling {scaling} cannot be run (linear, yarn and Llama 3's can)")
    original = number(ORIGINAL_KEY)
    fast, slow = (number(YARN_KEYS[name], default) for name, default in _YARN_DEFAULTS.items())

    def pair_with_turns(turns: float) -> float:
        """Return the (fractional) index of the pair that turns this many times within the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) if base > 1 else 0.0

    first, last = pair_with_turns(fast), pair_with_turns(slow)
    low = max(math.floor(first) if truncates else first, 0)
    high = min(math.ceil(last) if truncates else last, head_dim - 1)
    # Pairs below `low` keep their frequency; pairs above `high` are scaled linearly; pairs in between are mixed.
    scaled_share = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    attention_factor = number(YARN_KEYS["attention_factor"], 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return Rotation(frequencies * (1 - scaled_share) + frequencies / factor * scaled_share, attention_factor)


def rotation_from_base(base: float, head_dim: int) -> Rotation:
    """Return the rotation for a base without scaling."""
    return Rotation(_frequencies(base, head_dim))


def _frequencies(base: float, head_dim: int) -> np.ndarray:
    return base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)

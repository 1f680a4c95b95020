"""Rotary embedding: the angles that GGUF's keys and Llama 3's factors mean.

How config.json and GGUF's keys translate into one another is in `rope_keys`. The formulas of the scalings are those of
their papers (linear: Chen et al., arXiv:2306.15595; YaRN: Peng et al., arXiv:2309.00071; Llama 3.1's has none) as
transformers computes them.
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
BASE_KEY = "rope.freq_base"
SLIDING_BASE_KEY = "rope.freq_base_swa"
DEFAULT_BASE = 10000.0
TYPE_KEY = "rope.scaling.type"
FACTOR_KEY = "rope.scaling.factor"
ORIGINAL_KEY = "rope.scaling.original_context_length"
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
    """How a layer rotates its queries and keys.

    Attributes:
        frequencies: float64 [head_dim / 2], radians per token of each pair; zeros rotate nothing.
        length: what both are multiplied with besides.

    """

    frequencies: np.ndarray
    length: float = 1.0


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray | None:
    """Return `rope_freqs.weight` of a model with Llama 3's rope scaling, else None.

    float32 [head_dim / 2]: what each pair's rotation frequency is divided by. Waves shorter than the original
    context over `high_freq_factor` keep their frequency, those longer than it over `low_freq_factor` are
    slowed by `factor`, and between the two the reciprocal goes over linearly in the number of turns per
    original context (Llama 3.1).
    """
    if rope["rope_type"] != "llama3":
        return None
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1.0 / np.float32(rope["rope_theta"]) ** exponents
    turns = rope["original_max_position_embeddings"] * frequencies.astype(np.float64) / (2 * math.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - share) / factor + share)).astype(np.float32)


def rotation_of_keys(metadata: Mapping[str, Any], head_dim: int, where: str) -> Rotation:
    """Return the rotation that a GGUF model's keys mean, without what `rope_freqs.weight` adds.

    Raises TritGgufError for a scaling other than linear and YaRN, and for a value that is no positive number.
    """
    arch = metadata["general.architecture"]

    def number(key: str, default: float | None = None) -> float:
        name = f"{arch}.{key}"
        return positive_number(metadata.get(name, default), name, where)

    base = number(BASE_KEY, DEFAULT_BASE)
    frequencies = _frequencies(base, head_dim)
    scaling = metadata.get(f"{arch}.{TYPE_KEY}", "none")
    if scaling == "none":
        return Rotation(frequencies)
    factor = number(FACTOR_KEY)
    if scaling == "linear":
        return Rotation(frequencies / factor)
    if scaling != "yarn":
        raise TritGgufError(f"{where}: rope scaling {scaling} cannot be run (linear, yarn and Llama 3's can)")
    original = number(ORIGINAL_KEY)
    fast, slow = (number(YARN_KEYS[name], default) for name, default in _YARN_DEFAULTS.items())

    def pair_that_turns(times: float) -> float:
        """Return the pair, as a fraction, that turns so many times in the original context."""
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base)) if base > 1 else 0.0

    low = max(math.floor(pair_that_turns(fast)), 0)
    high = min(math.ceil(pair_that_turns(slow)), head_dim - 1)
    # Pairs below `low` turn often enough to keep their frequency; those above `high` are slowed like linear scaling's.
    slowed = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    attention_factor = number(YARN_KEYS["attention_factor"], 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return Rotation(frequencies * (1 - slowed) + frequencies / factor * slowed, attention_factor)


def rotation_of_base(base: float, head_dim: int) -> Rotation:
    """Return the rotation of a base without any scaling."""
    return Rotation(_frequencies(base, head_dim))


def _frequencies(base: float, head_dim: int) -> np.ndarray:
    return base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)

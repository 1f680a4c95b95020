"""Rotary embedding: what config.json and GGUF's keys say about it, and the angles that they mean.

The formulas of the scalings are those of their papers (linear: Chen et al., arXiv:2306.15595; YaRN: Peng et al.,
arXiv:2309.00071; Llama 3.1's has none) as transformers computes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tritgguf.errors import TritGgufError
from tritgguf.formats.checked import count_of, positive_number

ROPE_FREQS = "rope_freqs.weight"
_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
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


def rope_parameters(config: Mapping[str, Any], context: int, where: str = "config.json") -> dict[str, Any]:
    """Return `rope_type`, `rope_theta` and what the type needs, from both layouts of config.json.

    Before transformers 5, `rope_theta` stood beside `rope_scaling`; since then both are in `rope_parameters`, and where
    layers differ there is one object for each kind of attention: it is the one for the whole text that counts here.
    `context` stands in for a missing max_position_embeddings. Raises TritGgufError for what cannot be run.
    """
    stored = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(stored, dict) and isinstance(stored.get("full_attention"), dict):
        stored = stored["full_attention"]
    if not isinstance(stored, dict):
        raise TritGgufError(f"{where}: rope_parameters is not an object")
    context = config.get("max_position_embeddings", context)
    defaults = {
        "rope_type": stored.get("type", "default"),
        "rope_theta": config.get("rope_theta", 10000.0),
        "original_max_position_embeddings": config.get("original_max_position_embeddings", context),
    }
    parameters = {**defaults, **stored}
    kind = parameters["rope_type"]
    # `dynamic` changes nothing up to max_position_embeddings, where the model's context ends.
    if kind not in _TYPES:
        raise TritGgufError(
            f"{where}: rope type {kind} is not supported (default, linear, dynamic, yarn and llama3 are)"
        )
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise TritGgufError(f"{where}: rotating only a part of each head (partial_rotary_factor) is not supported")
    if parameters.get("mscale") is not None or parameters.get("truncate", True) is not True:
        raise TritGgufError(f"{where}: a rope scaling with mscale or without truncate is not supported")
    numbers = ["rope_theta", *(("factor",) if kind in ("linear", "yarn") else ())]
    if kind == "llama3":
        parameters = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **parameters}
        numbers += ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for key in numbers:
        positive_number(parameters.get(key), key, where)
    if kind == "llama3" and parameters["low_freq_factor"] == parameters["high_freq_factor"]:
        raise TritGgufError(f"{where}: low_freq_factor and high_freq_factor of the rope scaling are equal")
    return parameters


def sliding_rope_base(config: Mapping[str, Any], where: str = "config.json") -> float:
    """Return the base of the layers with a sliding window, of a model where it is another one; in both layouts."""
    parameters = config.get("rope_parameters") or {}
    stored = parameters.get("sliding_attention", {}) if isinstance(parameters, dict) else {}
    stored = stored if isinstance(stored, dict) else {}
    if stored.get("rope_type", "default") != "default":
        raise TritGgufError(f"{where}: a rope scaling of the layers with a sliding window is not supported")
    base = stored.get("rope_theta", config.get("rope_local_base_freq", 10000.0))
    return positive_number(base, "rope_local_base_freq", where)


def add_rope_scaling(writer: Any, rope: Mapping[str, Any], where: str) -> None:
    """Add the keys of a rope scaling to a GGUFWriter."""
    from gguf import RopeScalingType

    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(count_of(rope, "original_max_position_embeddings", where))
        for key, add in (
            ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(positive_number(rope[key], key, where))


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
        name = f"{arch}.rope.{key}"
        return positive_number(metadata.get(name, default), name, where)

    base = number("freq_base", 10000.0)
    frequencies = _frequencies(base, head_dim)
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling == "none":
        return Rotation(frequencies)
    factor = number("scaling.factor")
    if scaling == "linear":
        return Rotation(frequencies / factor)
    if scaling != "yarn":
        raise TritGgufError(f"{where}: rope scaling {scaling} cannot be run (linear, yarn and Llama 3's can)")
    original = number("scaling.original_context_length")
    fast, slow = (number(f"scaling.yarn_{key}", default) for key, default in _YARN_DEFAULTS.items())

    def pair_that_turns(times: float) -> float:
        """Return the pair, as a fraction, that turns so many times in the original context."""
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base)) if base > 1 else 0.0

    low = max(math.floor(pair_that_turns(fast)), 0)
    high = min(math.ceil(pair_that_turns(slow)), head_dim - 1)
    # Pairs below `low` turn often enough to keep their frequency; those above `high` are slowed like linear scaling's.
    slowed = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    attention_factor = number("scaling.yarn_attn_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return Rotation(frequencies * (1 - slowed) + frequencies / factor * slowed, attention_factor)


def rotation_of_base(base: float, head_dim: int) -> Rotation:
    """Return the rotation of a base without any scaling."""
    return Rotation(_frequencies(base, head_dim))


def _frequencies(base: float, head_dim: int) -> np.ndarray:
    return base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)

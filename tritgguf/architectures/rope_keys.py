"""Rotary embedding in config.json and in GGUF's keys: the rule `keys.ROPE`, and the scalings that are tensors.

config.json has two layouts. Before transformers 5, it had the entries `rope_theta` and `rope_scaling`. Since then both
are in `rope_parameters`, with one object per attention type if layers differ. GGUF has one key per number. `rope`
computes the frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.architectures.rope import (
    ATTENTION_FACTOR_KEY,
    BASE_KEY,
    DEFAULT_BASE,
    FACTOR_KEY,
    LONG_FACTORS,
    ORIGINAL_KEY,
    ROPE_FREQS,
    SHORT_FACTORS,
    SLIDING_BASE_KEY,
    TYPE_KEY,
    YARN_KEYS,
    llama3_factors,
    long_rope_attention_factor,
)
from tritgguf.errors import TritGgufError
from tritgguf.formats.checked import count_of, positive_number
from tritgguf.formats.dtypes import shortest_decimal

if TYPE_CHECKING:
    from tritgguf.architectures.key_rules import GgufKeys, GgufValue, HfConfig

_SHARE_ENTRY, _SHARE = "partial_rotary_factor", 0.25
_SECTIONS_ENTRY, _SECTIONS = "mrope_section", (11, 11, 10)
_SECTIONS_KEY, _SECTION_COUNT = "rope.dimension_sections", 4
_CONTEXT_ENTRY, _ORIGINAL_ENTRY = "max_position_embeddings", "original_max_position_embeddings"
_ORIGINAL = 4096  # transformers' default for Phi-3
_CONTEXT_KEY = "context_length"
_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_ATTENTION_TYPES = ("full_attention", "sliding_attention")
_LONG_ROPE, _LONG_ROPE_NAMES = "longrope", ("longrope", "su", "yarn")  # the names that Phi-3 has had for it
_MSCALES = ("short_mscale", "long_mscale")
_LONG_ROPE_ENTRIES = {LONG_FACTORS: "long_factor", SHORT_FACTORS: "short_factor"}


def rope_parameters(config: HfConfig) -> dict[str, Any]:
    """Return `rope_type`, `rope_theta` and the parameters of the type, from either layout of config.json.

    If layers differ, these are the parameters of full attention. Raises TritGgufError for unsupported or invalid
    parameters.
    """
    entries, where, stored = config.entries, config.where, _stored_parameters(config)
    context = config.get(_CONTEXT_ENTRY)
    defaults = {
        "rope_type": stored.get("type", "default"),
        "rope_theta": config.get("rope_theta", DEFAULT_BASE),
        _ORIGINAL_ENTRY: entries.get(_ORIGINAL_ENTRY, context),
    }
    parameters = {**defaults, **stored}
    rope_type = parameters["rope_type"]
    has_mscales = config.architecture.has_mscales  # these change what every other type means
    long_rope_names = (_LONG_ROPE,) if has_mscales else _LONG_ROPE_NAMES
    if config.architecture.long_rope and rope_type in long_rope_names:
        return _long_rope(parameters, config)
    # `dynamic` has no effect up to max_position_embeddings, the end of the model's context.
    types: tuple[str, ...] = ("default",) if has_mscales else _TYPES
    if config.architecture.has_states:
        types = tuple(kind for kind in _TYPES if kind != "llama3")  # its factors would be those of a part of each head
    if rope_type not in types:
        *others, last = (*types, _LONG_ROPE) if config.architecture.long_rope else types
        raise TritGgufError(f"{where}: rope type {rope_type} is not supported ({', '.join(others)} and {last} are)")
    _check_rotates_all(parameters, config)
    if rope_type in ("yarn", "llama3") and entries.get(_ORIGINAL_ENTRY) not in (None, parameters[_ORIGINAL_ENTRY]):
        raise TritGgufError(f"{where}: {_ORIGINAL_ENTRY} of the rope scaling is another than the one beside it")
    if parameters.get("mscale") is not None:
        raise TritGgufError(f"{where}: a rope scaling with mscale is not supported")
    truncates = config.architecture.truncates_yarn
    if rope_type == "yarn" and parameters.get("truncate", True) is not truncates:
        raise TritGgufError(
            f"{where}: a rope scaling {'without' if truncates else 'with'} truncate is not supported in a"
            f" {config.architecture.hf_class}"
        )
    numbers = ["rope_theta", *(("factor",) if rope_type in ("linear", "yarn") else ())]
    if rope_type == "llama3":
        parameters = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **parameters}
        numbers += ["factor", "low_freq_factor", "high_freq_factor", _ORIGINAL_ENTRY]
    for key in numbers:
        positive_number(parameters.get(key), key, where)
    if rope_type == "llama3" and parameters["low_freq_factor"] == parameters["high_freq_factor"]:
        raise TritGgufError(f"{where}: low_freq_factor and high_freq_factor of the rope scaling are equal")
    return parameters


def _stored_parameters(config: HfConfig) -> dict[str, Any]:
    """Return what config.json has of full attention's parameters; TritGgufError if its layouts contradict each other.

    Of two layouts, transformers takes `rope_scaling` alone, and the default base if that has none; Gemma 3 mixes them.
    """
    where, base = config.where, config.get("rope_theta", DEFAULT_BASE)
    new, old = (config.entries.get(entry) or {} for entry in ("rope_parameters", "rope_scaling"))
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise TritGgufError(f"{where}: rope_parameters is not an object")
    if new and config.architecture.sliding_rope is not any(kind in new for kind in _ATTENTION_TYPES):
        has = "needs" if config.architecture.sliding_rope else "cannot have"
        raise TritGgufError(
            f"{where}: a {config.architecture.hf_class} {has} rope_parameters for each type of attention"
        )
    if config.architecture.sliding_rope:
        new = new.get(_ATTENTION_TYPES[0]) or {}
        if not isinstance(new, dict):
            raise TritGgufError(f"{where}: rope_parameters is not an object")
    if config.architecture.sliding_rope and "rope_type" not in old and old.get("type", "default") != "default":
        raise TritGgufError(f"{where}: type of rope_scaling has to be named rope_type, or transformers ignores it here")
    plain = [{"rope_type": rope.get("type", "default"), "rope_theta": base, **rope} for rope in (new, old)]
    for rope in plain:
        rope.pop("type", None)
    if new and old and plain[0] != plain[1]:
        raise TritGgufError(f"{where}: rope_parameters and rope_scaling contradict each other; keep the right one")
    return new or old or config.default("rope_scaling") or {}


def _check_rotates_all(parameters: Mapping[str, Any], config: HfConfig) -> None:
    share = parameters.get(_SHARE_ENTRY, config.entries.get(_SHARE_ENTRY, 1.0))
    if share != 1.0 and not config.architecture.has_states:
        raise TritGgufError(f"{config.where}: rotating only a part of each head ({_SHARE_ENTRY}) is not supported")


def _long_rope(parameters: Mapping[str, Any], config: HfConfig) -> dict[str, Any]:
    """Return the checked parameters of LongRoPE, with `attention_factor`; the factors as float32 [head_dim / 2]."""
    where, half = config.where, config.dimensions.head_dim // 2
    _check_rotates_all(parameters, config)
    # transformers prefers the entry beside the scaling, which Phi's checkpoints have.
    inside = parameters[_ORIGINAL_ENTRY] if config.architecture.has_mscales else _ORIGINAL
    original = count_of(config.entries, _ORIGINAL_ENTRY, where, default=inside)
    context = count_of(config.entries, _CONTEXT_ENTRY, where, default=config.default(_CONTEXT_ENTRY))
    stored = parameters.get("factor")
    scaled = context if stored is None else original * positive_number(stored, "factor", where)
    attention_factor = parameters.get("attention_factor")
    if config.architecture.has_mscales:
        attention_factor = _mscale(parameters, where)
    if attention_factor is None:
        attention_factor = long_rope_attention_factor(scaled, original)
    checked = {
        "rope_type": _LONG_ROPE,
        "rope_theta": positive_number(parameters["rope_theta"], "rope_theta", where),
        _ORIGINAL_ENTRY: original,
        "attention_factor": positive_number(attention_factor, "attention_factor", where),
    }
    for entry in _LONG_ROPE_ENTRIES.values():
        values = parameters.get(entry)
        if not isinstance(values, list) or len(values) != half:
            raise TritGgufError(f"{where}: {entry} of the rope scaling is no list of {half} numbers")
        checked[entry] = np.array([positive_number(value, entry, where) for value in values], np.float32)
    return checked


def _mscale(parameters: Mapping[str, Any], where: str) -> float:
    """Return what short and long texts both multiply queries and keys with; GGUF has one key for it."""
    short, long = (positive_number(parameters.get(entry), entry, where) for entry in _MSCALES)
    if short != long:
        raise TritGgufError(f"{where}: a rope scaling with another long_mscale than short_mscale is not supported")
    return short


def factor_tensors(config: HfConfig) -> dict[str, np.ndarray]:
    """Return the `FACTOR_TENSORS` of a config.json by name, float32 [head_dim / 2]; none without such a scaling."""
    parameters = rope_parameters(config)
    if parameters["rope_type"] == _LONG_ROPE:
        return {name: parameters[entry] for name, entry in _LONG_ROPE_ENTRIES.items()}
    factors = llama3_factors(parameters, config.dimensions.head_dim)
    return {} if factors is None else {ROPE_FREQS: factors}


def long_rope_scaling(
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, Any],
    config: Mapping[str, Any],
    where: str,
    *,
    has_mscales: bool,
) -> dict[str, Any]:
    """Return the entries of LongRoPE's scaling; `read` returns a tensor, `config` are entries of config.json.

    `attention_factor` is left out if it follows from the lengths, because older versions of transformers refuse it.
    `has_mscales` is as in `Architecture`.
    """
    factors = {
        entry: [shortest_decimal(float(number)) for number in read(name)] for name, entry in _LONG_ROPE_ENTRIES.items()
    }
    key = f"{metadata['general.architecture']}.{ATTENTION_FACTOR_KEY}"
    factor = positive_number(metadata.get(key, 1.0), key, where)
    if has_mscales:
        return factors | dict.fromkeys(_MSCALES, shortest_decimal(factor))
    usual = long_rope_attention_factor(config[_CONTEXT_ENTRY], config[_ORIGINAL_ENTRY])
    return factors | ({} if np.float32(factor) == np.float32(usual) else {"attention_factor": shortest_decimal(factor)})


def rotated_dim_from_config(entries: Mapping[str, Any], head_dim: int, where: str) -> int:
    """Return how many elements of a head rotate, of a family that rotates a part; TritGgufError for none."""
    rope = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    stored = rope.get(_SHARE_ENTRY) if isinstance(rope, dict) else None
    share = positive_number(entries.get(_SHARE_ENTRY, _SHARE) if stored is None else stored, _SHARE_ENTRY, where)
    rotated = int(head_dim * share)
    if not 1 <= rotated <= head_dim:
        raise TritGgufError(f"{where}: {_SHARE_ENTRY} is {share}, which rotates {rotated} of {head_dim} elements")
    return rotated


def _sections(parameters: Mapping[str, Any], where: str) -> list[int]:
    """Return which pairs rotate by time, height and width of an image; for text these are the same position."""
    sections = parameters.get(_SECTIONS_ENTRY, list(_SECTIONS))
    whole = isinstance(sections, list) and all(type(count) is int and 0 <= count < 1 << 20 for count in sections)
    if not whole or len(sections) > _SECTION_COUNT:
        raise TritGgufError(f"{where}: {_SECTIONS_ENTRY} is {sections!r:.80}, which is no list of up to four counts")
    return sections + [0] * (_SECTION_COUNT - len(sections))


def rope_to_gguf(config: HfConfig) -> dict[str, GgufValue]:
    """Return the keys of the scaling and the bases; Llama 3's scaling is a tensor and has no keys."""
    parameters, where = rope_parameters(config), config.where
    keys: dict[str, GgufValue] = {}
    if parameters["rope_type"] in ("linear", "yarn"):
        keys = {TYPE_KEY: parameters["rope_type"], FACTOR_KEY: float(parameters["factor"])}
    if parameters["rope_type"] == _LONG_ROPE:
        keys = {ORIGINAL_KEY: parameters[_ORIGINAL_ENTRY], ATTENTION_FACTOR_KEY: float(parameters["attention_factor"])}
    if parameters["rope_type"] == "yarn":
        keys[ORIGINAL_KEY] = count_of(parameters, _ORIGINAL_ENTRY, where)
        for entry, key in YARN_KEYS.items():
            if parameters.get(entry) is not None:
                keys[key] = positive_number(parameters[entry], entry, where)
    if config.architecture.has_states:
        keys[_SECTIONS_KEY] = _sections(parameters, where)
    keys[BASE_KEY] = float(parameters["rope_theta"])
    if config.architecture.sliding_rope:
        keys[SLIDING_BASE_KEY] = _sliding_base(config)
    return keys


def _sliding_base(config: HfConfig) -> float:
    """Return the base of the layers with a sliding window, from either layout."""
    parameters = config.entries.get("rope_parameters") or {}
    stored = parameters.get("sliding_attention", {}) if isinstance(parameters, dict) else {}
    stored = stored if isinstance(stored, dict) else {}
    if stored.get("rope_type", "default") != "default":
        raise TritGgufError(f"{config.where}: a rope scaling of the layers with a sliding window is not supported")
    base = stored.get("rope_theta", config.get("rope_local_base_freq", DEFAULT_BASE))
    return positive_number(base, "rope_local_base_freq", config.where)


def rope_to_hf(keys: GgufKeys) -> dict[str, Any]:
    """Return `rope_parameters` in the layout of transformers 5."""

    def number(key: str, default: float | None = None, *, whole: bool = False) -> Any:
        return shortest_decimal(keys.number(key, default, whole=whole))

    rope_type = keys.get(TYPE_KEY, "none")
    if rope_type not in ("none", "linear", "yarn"):
        raise TritGgufError(f"{keys.where}: rope scaling {rope_type} is not supported (linear and yarn are)")
    rope = {"rope_type": "default" if rope_type == "none" else rope_type, "rope_theta": number(BASE_KEY, DEFAULT_BASE)}
    if rope_type != "none":
        rope["factor"] = number(FACTOR_KEY)
    if rope_type == "yarn":
        rope[_ORIGINAL_ENTRY] = number(ORIGINAL_KEY, whole=True)
        rope |= {entry: number(key) for entry, key in YARN_KEYS.items() if keys.get(key) is not None}
        rope |= {} if keys.architecture.truncates_yarn else {"truncate": False}
    if keys.architecture.has_states:
        sections = _sections({_SECTIONS_ENTRY: keys.get(_SECTIONS_KEY, list(_SECTIONS))}, keys.where)
        rotated, head_dim = keys.dimensions.rotated_dim, keys.dimensions.head_dim
        rope[_SHARE_ENTRY] = (head_dim if rotated is None else rotated) / head_dim
        rope |= {_SECTIONS_ENTRY: sections if sections[-1] else sections[:-1], "mrope_interleaved": True}
    if LONG_FACTORS in keys.tensors:
        return {"rope_parameters": rope, _ORIGINAL_ENTRY: number(ORIGINAL_KEY, keys.get(_CONTEXT_KEY), whole=True)}
    if not keys.architecture.sliding_rope:
        return {"rope_parameters": rope}
    sliding = {"rope_type": "default", "rope_theta": number(SLIDING_BASE_KEY, DEFAULT_BASE)}
    return {"rope_parameters": {"full_attention": rope, "sliding_attention": sliding}}


def legacy_rope_entries(rope: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters` as entries of the layout before transformers 5, which all versions can read."""
    entries = {}
    if "sliding_attention" in rope:
        entries["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    entries["rope_theta"] = rope["rope_theta"]
    entries["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    return entries


def llama3_scaling(factors: np.ndarray, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the Llama 3 rope scaling for the factors of `llama3_factors`: float32 [head_dim / 2].

    Inverts their formula, with the `rope_theta` of `config`. Between the two limits a pair's share is
    (original * frequency / 2 pi - low) / (high - low), which is linear in the frequency. This determines original, low
    and high up to a common factor; we choose low = 1, as in Llama 3.1. Raises TritGgufError if no scaling fits.
    """
    factor = float(factors.max())
    share = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor) if factor > 1 else np.ones(len(factors))
    frequencies = config["rope_theta"] ** (-np.arange(len(factors)) / len(factors))
    between = (share > 1e-5) & (share < 1 - 1e-5)
    low, high = 1.0, 4.0
    if between.sum() >= 2:
        slope, intercept = np.polyfit(frequencies[between], share[between], 1)
        high = round(low - low / intercept, 4)
    elif between.any():
        slope = ((share + low / (high - low)) / frequencies)[between][0]
    else:
        slope = math.nan
    original = slope * 2 * math.pi * (high - low)
    scaling = {
        "rope_type": "llama3",
        "factor": shortest_decimal(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        _ORIGINAL_ENTRY: round(original) if math.isfinite(original) else 0,
    }
    if scaling[_ORIGINAL_ENTRY] > 0 and high > 0 and high != low:
        again = llama3_factors({**scaling, "rope_theta": config["rope_theta"]}, 2 * len(factors))
        if again is not None and np.allclose(again, factors, rtol=1e-4):
            return scaling
    raise TritGgufError(f"{where}: config.json cannot express tensor {ROPE_FREQS}; export a GGUF file instead")

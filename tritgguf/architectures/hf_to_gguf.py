"""Conversion of config.json into GGUF keys, with llama.cpp's names and order.

It applies the rules of the model's family (`keys`). `gguf_to_hf` is the other direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tritgguf.architectures.architecture import Architecture
from tritgguf.architectures.dimensions import dimensions_from_config, find_architecture
from tritgguf.architectures.key_rules import HfConfig
from tritgguf.architectures.rope_keys import factor_tensors, rope_parameters

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFValue


def gguf_metadata(config: Mapping[str, Any], where: str = "config.json") -> dict[str, GGUFValue]:
    """Return general.architecture and the keys `llama.*`, `qwen2.*` etc.

    Raises TritGgufError for an entry of config.json that is impossible or not supported.
    """
    from gguf import GGUFValue, GGUFValueType

    model = _checked(config, where)
    arch = model.architecture.gguf_name
    types = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
        list: GGUFValueType.ARRAY,
    }
    metadata = {"general.architecture": GGUFValue(arch, GGUFValueType.STRING)}
    for rule in model.architecture.rules():
        for key, value in rule.to_gguf(model).items():
            of_items = None
            if isinstance(value, list):
                of_items = GGUFValueType.BOOL if isinstance(value[0], bool) else GGUFValueType.INT32
            metadata[f"{arch}.{key}"] = GGUFValue(value, types[type(value)], of_items)
    return metadata


def rope_factors(config: Mapping[str, Any], where: str = "config.json") -> dict[str, np.ndarray]:
    """Return the `FACTOR_TENSORS` of Llama 3's rope scaling and of LongRoPE: name -> float32 [head_dim / 2]."""
    return factor_tensors(_checked(config, where))


def left_out(config: Mapping[str, Any], where: str = "config.json") -> list[str]:
    """Return what a config.json has that no GGUF key has, as sentences for warnings."""
    model = _checked(config, where)
    if rope_parameters(model)["rope_type"] != "dynamic":
        return []
    context = model.get("max_position_embeddings")
    return [f"its dynamic rope scaling is left out; it changes texts of more than {context} tokens"]


def is_tied(config: Mapping[str, Any], architecture: Architecture) -> bool:
    """Tell whether config.json ties the output head to the embeddings."""
    entries = architecture.standard_entries(config, "config.json")
    return bool(entries.get("tie_word_embeddings", architecture.defaults.get("tie_word_embeddings", False)))


def _checked(config: Mapping[str, Any], where: str) -> HfConfig:
    architecture = find_architecture(config, where)
    entries = architecture.standard_entries(config, where)
    return HfConfig(entries, architecture, dimensions_from_config(config, where), where)

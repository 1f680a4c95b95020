"""The table of keys: both directions agree for every family."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from model_keys import values_of

from tritgguf.architectures import dimensions, gguf_to_hf
from tritgguf.architectures.key_rules import KeyRule, SizeRule
from tritgguf.architectures.table import ARCHITECTURES

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
all_classes = pytest.mark.parametrize("hf_class", list(ARCHITECTURES))


def config_of(hf_class: str, **entries: Any) -> dict[str, Any]:
    """Return a config.json that relies on most defaults of its family."""
    sizes = {**_SIZES, "num_attention_heads": 16} if ARCHITECTURES[hf_class].has_states else _SIZES
    return {"architectures": [hf_class], **sizes, **entries}  # 16 heads of 256 are as wide as 32 value heads of 128


def round_trip(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the GGUF keys of a config.json and the entries converted back from them."""
    keys = values_of(config)
    stored = {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in keys.items()}
    shapes = dimensions.dimensions_from_config(config).shapes()
    return stored, gguf_to_hf.config_entries(stored, shapes, "model.gguf")


def standard(hf_class: str, entries: dict[str, Any]) -> dict[str, Any]:
    """Return entries under the names that most families have."""
    return dict(ARCHITECTURES[hf_class].standard_entries(entries, "config.json"))


@all_classes
def test_defaults_lead_back(hf_class: str) -> None:
    keys, entries = round_trip(config_of(hf_class))
    keys_again, entries_again = round_trip({"architectures": [hf_class], **entries})
    assert entries_again == entries
    assert keys.items() <= keys_again.items()  # GGUF has the head dimension now
    stated = {"num_key_value_heads", "tie_word_embeddings"}  # by the config and by the tensors
    defaults = {name: value for name, value in ARCHITECTURES[hf_class].defaults.items() if name not in stated}
    rope = entries["rope_parameters"]
    rope = rope.get("full_attention", rope)
    assert defaults.pop("rope_scaling", {}).items() <= rope.items()
    assert defaults.items() <= {**standard(hf_class, entries), **rope}.items()


@all_classes
def test_numbers_lead_back(hf_class: str) -> None:
    rules = [rule for rule in ARCHITECTURES[hf_class].rules() if isinstance(rule, KeyRule)]
    numbers = {rule.hf: 100 + place for place, rule in enumerate(rules)}
    _, entries = round_trip(config_of(hf_class, **numbers))
    assert {name: standard(hf_class, entries)[name] for name in numbers} == numbers


@all_classes
def test_no_key_has_two_rules(hf_class: str) -> None:
    rules = [rule for rule in ARCHITECTURES[hf_class].rules() if isinstance(rule, KeyRule | SizeRule)]
    assert max(Counter(rule.gguf for rule in rules).values()) == 1

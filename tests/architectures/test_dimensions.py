"""Sizes from config.json and from GGUF keys, and the resulting shapes."""

from __future__ import annotations

from typing import Any

import pytest
from model_keys import config_of, values_of
from tiny_models import VARIANTS, random_weights

from tritgguf.architectures import dimensions, tensor_names
from tritgguf.errors import TritGgufError


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_shapes_are_those_of_a_model_with_this_config(variant: str) -> None:
    config = config_of(variant)
    expected = dimensions.dimensions_from_config(config).shapes()
    if config["tie_word_embeddings"]:
        del expected["output.weight"]
    arch = dimensions.find_architecture(config).gguf_name
    found = {tensor_names.gguf_tensor_name(arch, name): array.shape for name, array in random_weights(config).items()}
    assert found == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"general.architecture": "bloom"},
            r"architecture bloom is not supported \(supported: llama, qwen2, .*, gemma3, .*\)",
        ),
        (
            {"general.architecture": ["llama"]},
            r"is not supported",
        ),
        ({"llama.block_count": None}, r"llama\.block_count is missing"),
        ({"llama.attention.head_count": [4, 4]}, "head_count is"),
        ({"llama.attention.value_length": 64}, "value_length is 64"),
        ({"llama.rope.dimension_count": 16}, "dimension_count is 16"),
        ({"llama.expert_count": 8}, r"llama\.expert_used_count is missing"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 9}, "there are only 8 experts"),
        ({"llama.expert_count": 1 << 20, "llama.expert_used_count": 2}, "expert_count is 1048576"),
        ({"llama.expert_count": [8], "llama.expert_used_count": 2}, r"expert_count is \[8\]"),
        (
            {"llama.expert_count": 8, "llama.expert_used_count": 2, "llama.expert_weights_norm": 1},
            "neither true nor false",
        ),
    ],
)
def test_bad_gguf_keys_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TritGgufError, match=message):
        dimensions.dimensions_from_gguf({**values_of(config_of("llama")), **changes}, 448, frozenset(), "model.gguf")


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "unaligned"])
def test_gguf_keys_and_config_state_the_same_sizes(variant: str) -> None:
    config = config_of(variant)
    expected = dimensions.dimensions_from_config(config)
    found = dimensions.dimensions_from_gguf(values_of(config), expected.vocabulary, expected.biased, "x")
    assert found == expected


@pytest.mark.parametrize(
    ("keys", "hf_class"),
    [
        ({}, "LlamaForCausalLM"),
        ({"llama.attention.sliding_window": 64}, "MistralForCausalLM"),
        ({"llama.expert_count": 8}, "MixtralForCausalLM"),
        ({"llama.expert_count": 8, "llama.attention.sliding_window": 64}, "MixtralForCausalLM"),
        ({"general.architecture": "granitemoe", "granitemoe.expert_count": 8}, "GraniteMoeForCausalLM"),
        (
            {
                "general.architecture": "granitemoe",
                "granitemoe.expert_count": 8,
                "granitemoe.expert_shared_feed_forward_length": 64,
            },
            "GraniteMoeSharedForCausalLM",
        ),
        ({"general.architecture": "qwen2", "qwen2.attention.sliding_window": 64}, "Qwen2ForCausalLM"),
    ],
)
def test_keys_tell_classes_of_one_name_apart(keys: dict[str, Any], hf_class: str) -> None:
    metadata = {"general.architecture": "llama", **keys}
    assert dimensions.find_gguf_architecture(metadata, "model.gguf").hf_class == hf_class

"""Conversion of config.json to GGUF keys: agreement with llama.cpp's converter, and errors."""

from __future__ import annotations

import math
from typing import Any

import gguf
import pytest
from model_keys import config_of, values_of

from tritgguf.architectures import hf_to_gguf
from tritgguf.errors import TritGgufError

# What llama.cpp's convert_hf_to_gguf.py writes for the tiny models.
_LLAMA_KEYS = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 128,
    "llama.feed_forward_length": 192,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.attention.key_length": 32,
    "llama.attention.value_length": 32,
    "llama.vocab_size": 448,
    "llama.rope.dimension_count": 32,
}

_ROPE = {"rope_type": "default", "rope_theta": 500.0}
_GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "hidden_act": "gelu_pytorch_tanh"}
_QWEN3_MOE = {"architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 64, "num_experts": 8}


def test_keys_of_llama_in_order_and_with_their_types() -> None:
    metadata = hf_to_gguf.gguf_metadata(config_of("llama"))
    assert [(key, value.value) for key, value in metadata.items()] == list(_LLAMA_KEYS.items())
    floats = {key for key, value in metadata.items() if value.type == gguf.GGUFValueType.FLOAT32}
    assert floats == {"llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon"}
    counts = set(metadata) - floats - {"general.architecture"}
    assert {metadata[key].type for key in counts} == {gguf.GGUFValueType.UINT32}


def test_keys_of_qwen2() -> None:
    leave_out = ("key_length", "value_length", "vocab_size", "dimension_count")
    expected = {
        key.replace("llama", "qwen2"): value for key, value in _LLAMA_KEYS.items() if not key.endswith(leave_out)
    }
    expected |= {"general.architecture": "qwen2", "qwen2.rope.freq_base": 1000000.0}
    assert list(values_of(config_of("qwen2")).items()) == list(expected.items())
    assert values_of(config_of("qwen2", head_dim=16))["qwen2.attention.key_length"] == 16


def test_keys_of_mistral_are_llamas() -> None:
    values = values_of(config_of("mistral"))
    assert list(values) == list(_LLAMA_KEYS)
    assert (values["general.architecture"], values["llama.attention.key_length"]) == ("llama", 64)
    assert (values["llama.rope.dimension_count"], values["llama.rope.freq_base"]) == (64, 1000000.0)


def test_what_config_json_may_leave_out() -> None:
    config = config_of("llama")
    for key in ("rope_theta", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"):
        del config[key]
    values = values_of(config)
    assert (values["llama.attention.head_count_kv"], values["llama.context_length"]) == (4, 2048)
    assert (values["llama.rope.freq_base"], values["llama.attention.layer_norm_rms_epsilon"]) == (1e4, 1e-6)


@pytest.mark.parametrize(
    ("hf_class", "base"), [("MixtralForCausalLM", 1e6), ("SmolLM3ForCausalLM", 2e6), ("Gemma3ForCausalLM", 1e6)]
)
def test_the_base_that_a_family_has_without_an_entry(hf_class: str, base: float) -> None:
    activation = "gelu_pytorch_tanh" if hf_class.startswith("Gemma") else "silu"
    config = config_of("llama", architectures=[hf_class], hidden_act=activation)
    del config["rope_theta"]
    values = values_of(config)
    assert values[f"{values['general.architecture']}.rope.freq_base"] == base


def test_only_the_architecture_tells_whether_a_window_is_used() -> None:
    """The Mistral of transformers has no switch for it."""
    config = config_of("mistral", sliding_window=64, use_sliding_window=False)
    assert values_of(config)["llama.attention.sliding_window"] == 64


def test_layers_without_a_window_need_no_switch() -> None:
    """Qwen's published checkpoints have a window that is switched off, or begins behind the last layer."""
    expected = values_of(config_of("qwen2"))
    for switch, first in ((False, 1), (True, 2)):
        entries = {"sliding_window": 64, "use_sliding_window": switch, "max_window_layers": first}
        assert values_of(config_of("qwen2", **entries)) == expected


def test_two_layouts_of_the_rope_parameters_that_agree() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    both = config_of("llama", rope_scaling=linear, rope_parameters={**linear, "rope_theta": 10000.0})
    assert values_of(both) == values_of(config_of("llama", rope_scaling=linear))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"architectures": None}, "names no model class"),
        ({"architectures": []}, "names no model class"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "128"}, "hidden_size is '128'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "cannot share 3 key-value heads"),
        ({"num_attention_heads": 1000}, "head_dim is 0"),
        ({"head_dim": 33}, "cannot be rotated in pairs"),
        ({"hidden_act": "gelu"}, "activation gelu is not supported"),
        ({"architectures": ["Qwen2ForCausalLM"], "mlp_bias": True}, "mlp_bias"),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias"),
        (
            {
                "architectures": ["Gemma2ForCausalLM"],
                "hidden_act": "gelu_pytorch_tanh",
                "layer_types": ["full_attention"] * 2,
            },
            "layer_types are not those of a Gemma2ForCausalLM",
        ),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [0, 1]},
            "layers without rotation",
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            "a sliding window of a Qwen2ForCausalLM",
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 1}, "sliding window"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "num_hidden_layers": 29},
            "sliding window",
        ),
        ({**_QWEN3_MOE, "use_sliding_window": True, "max_window_layers": 48}, "sliding window of a Qwen3Moe"),
        (
            {
                "architectures": ["SmolLM3ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 64,
                "max_window_layers": 28,
            },
            "a sliding window of a SmolLM3ForCausalLM",
        ),
        ({**_GEMMA3, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping of a Gemma3ForCausalLM"),
        ({**_GEMMA3, "sliding_window_pattern": 3}, "sliding_window_pattern is not 6"),
        ({**_GEMMA3, "sliding_window": None, "layer_types": ["full_attention"] * 2}, "layer_types are not those"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -1}, "sliding_window is -1"),
        ({"architectures": ["GraniteForCausalLM"], "logits_scaling": 0}, "logits_scaling is 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"rope_scaling": "linear"}, "is not an object"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type longrope is not supported"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4.0}}, "are equal"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": _ROPE, "rope_scaling": {"type": "linear", "factor": 2.0}}, "contradict each other"),
        (
            {"rope_parameters": _ROPE, "rope_scaling": {"rope_type": "default"}, "rope_theta": 1e4},
            "contradict each other",
        ),
        ({"rope_parameters": {"full_attention": _ROPE}}, "LlamaForCausalLM cannot have rope_parameters for each type"),
        ({**_GEMMA3, "rope_scaling": {"type": "linear", "factor": 8.0}}, "has to be named rope_type"),
        ({**_GEMMA3, "rope_parameters": _ROPE}, "Gemma3ForCausalLM needs rope_parameters for each type of attention"),
        ({**_GEMMA3, "rope_parameters": {"full_attention": 1}}, "is not an object"),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
                "original_max_position_embeddings": 128,
            },
            "original_max_position_embeddings of the rope scaling is another",
        ),
    ],
)
def test_a_bad_config_names_the_entry(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TritGgufError, match=message) as caught:
        hf_to_gguf.gguf_metadata({**config_of("llama"), **changes}, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")
    assert "\n" not in str(caught.value)

"""Names, keys, shapes and row order of the architectures."""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VARIANTS, random_weights, tiny_config

from tritgguf.architectures import dimensions, hf_to_gguf, tensor_names
from tritgguf.architectures.rope import ROPE_FREQS
from tritgguf.errors import TritGgufError

VARIANT_NAMES = list(VARIANTS)


def config_of(variant: str, **changes: Any) -> dict[str, Any]:
    arguments = {**VARIANTS[variant], **changes}
    return tiny_config(**{k: v for k, v in arguments.items() if k not in ("dtype", "shards", "seed")})


def arch_of(config: dict[str, Any]) -> str:
    return dimensions.find_architecture(config).gguf_name


def values_of(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value.value for key, value in hf_to_gguf.gguf_metadata(config).items()}


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_shapes_are_those_of_a_model_with_this_config(variant: str) -> None:
    config = config_of(variant)
    expected = dimensions.dimensions_from_config(config).shapes()
    if config["tie_word_embeddings"]:
        del expected["output.weight"]
    found = {
        tensor_names.gguf_tensor_name(arch_of(config), name): array.shape
        for name, array in random_weights(config).items()
    }
    assert found == expected


@pytest.mark.parametrize(("arch", "variant"), [("llama", "llama-biases"), ("qwen2", "qwen2"), ("llama", "mistral")])
def test_names_agree_with_gguf_pys_table(arch: str, variant: str) -> None:
    model_arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[arch]
    table = gguf.get_tensor_name_map(model_arch, 2)
    for hf_name in random_weights(config_of(variant)):
        ours = tensor_names.gguf_tensor_name(arch, hf_name)
        assert ours == table.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert ours is not None
        assert tensor_names.hf_tensor_name(arch, ours) == hf_name


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.01.mlp.up_proj.weight",
        "model.layers.\u0661.mlp.up_proj.weight",
        "model.embed_tokens.bias",
        "transformer.wte.weight",
        "lm_head.weight.weight",
        "",
    ],
)
def test_an_unknown_tensor_has_no_gguf_name(name: str) -> None:
    assert tensor_names.gguf_tensor_name("llama", name) is None


def test_rope_factors_have_no_hugging_face_name() -> None:
    with pytest.raises(TritGgufError, match=r"rope_freqs\.weight has no counterpart"):
        tensor_names.hf_tensor_name("llama", ROPE_FREQS)


def test_the_seven_matrices_of_a_layer_are_quantized_and_nothing_else() -> None:
    names = dimensions.dimensions_from_config(config_of("llama-biases")).shapes()
    packed = {name for name in names if tensor_names.quantized_tensor(name)}
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert packed == {f"blk.{layer}.{kind}.weight" for layer in range(2) for kind in kinds}
    assert not tensor_names.quantized_tensor(ROPE_FREQS)


# ---- row order ----


def test_rows_of_a_head_are_interleaved() -> None:
    rows = np.arange(16, dtype=np.float32).reshape(16, 1)
    permuted = tensor_names.from_hf("llama", "blk.0.attn_q.weight", rows, 2, 1)
    assert permuted[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    one_head = tensor_names.from_hf("llama", "blk.0.attn_k.bias", rows[:, 0], 2, 1)
    assert one_head.tolist() == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]


@given(
    heads=st.integers(1, 5),
    half=st.integers(1, 6),
    columns=st.integers(1, 4),
    name=st.sampled_from(["blk.0.attn_q.weight", "blk.31.attn_k.weight"]),
)
def test_the_permutation_is_undone(heads: int, half: int, columns: int, name: str) -> None:
    array = np.random.default_rng(0).standard_normal((heads * 2 * half, columns)).astype(np.float32)
    there = tensor_names.from_hf("llama", name, array, heads, heads)
    assert sorted(map(tuple, there)) == sorted(map(tuple, array))
    np.testing.assert_array_equal(tensor_names.to_hf("llama", name, there, heads, heads), array)


def test_rotating_pairs_of_permuted_rows_is_rotating_halves() -> None:
    """The reason for the permutation: Hugging Face rotates (i, i + half), llama.cpp's llama (2i, 2i + 1)."""
    generator = np.random.default_rng(1)
    heads, half, width = 3, 4, 5
    matrix = generator.standard_normal((heads * 2 * half, width))
    vector, angles = generator.standard_normal(width), generator.standard_normal(half)
    rotation = np.cos(angles) + 1j * np.sin(angles)
    halves = (matrix @ vector).reshape(heads, 2, half)
    expected = (halves[:, 0] + 1j * halves[:, 1]) * rotation
    permuted = tensor_names.from_hf("llama", "blk.0.attn_q.weight", matrix, heads, heads)
    pairs = (permuted @ vector).reshape(heads, half, 2)
    np.testing.assert_allclose((pairs[..., 0] + 1j * pairs[..., 1]) * rotation, expected)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("llama", "blk.0.attn_v.weight"),
        ("llama", "blk.0.attn_output.weight"),
        ("llama", "token_embd.weight"),
        ("qwen2", "blk.0.attn_q.weight"),
        ("qwen2", "blk.0.attn_k.bias"),
    ],
)
def test_other_tensors_keep_their_rows(arch: str, name: str) -> None:
    array = np.arange(32, dtype=np.float32).reshape(16, 2)
    np.testing.assert_array_equal(tensor_names.from_hf(arch, name, array, 2, 2), array)
    np.testing.assert_array_equal(tensor_names.to_hf(arch, name, array, 2, 2), array)


# ---- keys ----

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


def test_keys_of_rope_scaling_stand_before_the_base() -> None:
    linear = values_of(config_of("linear-rope"))
    assert list(linear)[7:10] == [
        "llama.rope.scaling.type",
        "llama.rope.scaling.factor",
        "llama.rope.freq_base",
    ]
    assert (linear["llama.rope.scaling.type"], linear["llama.rope.scaling.factor"]) == ("linear", 2.0)
    yarn = values_of(config_of("yarn-rope"))
    assert yarn["llama.rope.scaling.type"] == "yarn"
    assert yarn["llama.rope.scaling.original_context_length"] == 64
    assert not any("scaling" in key for key in values_of(config_of("llama3-rope")))


def test_both_layouts_of_the_rope_parameters_mean_the_same() -> None:
    scaling = VARIANTS["llama3-rope"]["rope_scaling"]
    old = config_of("llama", rope_theta=500000.0, rope_scaling=scaling)
    new = config_of("llama", rope_parameters={**scaling, "rope_theta": 500000.0})
    assert values_of(old) == values_of(new)
    np.testing.assert_array_equal(hf_to_gguf.rope_factors(old), hf_to_gguf.rope_factors(new))


def test_what_config_json_may_leave_out() -> None:
    config = config_of("llama")
    for key in ("rope_theta", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"):
        del config[key]
    values = values_of(config)
    assert (values["llama.attention.head_count_kv"], values["llama.context_length"]) == (4, 2048)
    assert (values["llama.rope.freq_base"], values["llama.attention.layer_norm_rms_epsilon"]) == (1e4, 1e-6)


def test_llama_3_rope_factors_follow_its_formula() -> None:
    config = config_of("llama", head_dim=64, rope_theta=500000.0)
    config["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = []
    for i in range(0, 64, 2):
        frequency = 500000.0 ** (-i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(1.0)
        elif wavelength > 8192 / 1:
            expected.append(32.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            slowed = (1 - smooth) * frequency / 32.0 + smooth * frequency
            expected.append(frequency / slowed)
    factors = hf_to_gguf.rope_factors(config)
    assert factors is not None
    assert factors.dtype == np.float32
    np.testing.assert_allclose(factors, expected, rtol=1e-5)
    assert 1.0 < sorted(set(expected))[1] < 32.0  # the case has a factor between the two ends


def test_other_models_have_no_rope_factors() -> None:
    assert hf_to_gguf.rope_factors(config_of("llama")) is None
    assert hf_to_gguf.rope_factors(config_of("linear-rope")) is None


# ---- errors ----


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
    ],
)
def test_a_bad_config_names_the_entry(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TritGgufError, match=message) as caught:
        hf_to_gguf.gguf_metadata({**config_of("llama"), **changes}, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"general.architecture": "bloom"},
            r"architecture bloom is not supported \(supported: llama, qwen2, .*, gemma3\)",
        ),
        (
            {"general.architecture": ["llama"]},
            r"is not supported",
        ),
        ({"llama.block_count": None}, r"llama\.block_count is missing"),
        ({"llama.attention.head_count": [4, 4]}, "head_count is"),
        ({"llama.attention.value_length": 64}, "value_length is 64"),
        ({"llama.rope.dimension_count": 16}, "dimension_count is 16"),
        ({"llama.expert_count": 8}, "experts"),
    ],
)
def test_bad_gguf_keys_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TritGgufError, match=message):
        dimensions.dimensions_from_gguf({**_LLAMA_KEYS, **changes}, 448, frozenset(), "model.gguf")


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "unaligned"])
def test_gguf_keys_and_config_state_the_same_sizes(variant: str) -> None:
    config = config_of(variant)
    expected = dimensions.dimensions_from_config(config)
    found = dimensions.dimensions_from_gguf(values_of(config), expected.vocabulary, expected.biased, "x")
    assert found == expected

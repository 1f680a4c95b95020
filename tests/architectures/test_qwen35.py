"""Qwen3.5's config.json, keys and tensors: kinds of layers, the order of value heads, decays, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_states import TYPES, qwen35_config, qwen35_weights

from tritgguf.architectures.delta_net import DeltaNet, decay_from_hf, decay_to_hf
from tritgguf.architectures.dimensions import dimensions_from_config, dimensions_from_gguf
from tritgguf.architectures.gguf_to_hf import config_entries
from tritgguf.architectures.hf_to_gguf import gguf_metadata
from tritgguf.architectures.tensor_names import from_hf, hf_tensor_name, hf_tensors, places_of, to_hf
from tritgguf.errors import TritGgufError

SIZES = DeltaNet(frozenset([0, 2, 3]), taps=4, key_heads=2, value_heads=6, key_dim=16, value_dim=32)


def keys_of(*, is_mixture: bool = False, **entries: Any) -> dict[str, Any]:
    config = qwen35_config(is_mixture=is_mixture, **entries)
    return {key: value.value for key, value in gguf_metadata(config).items()}


@pytest.mark.parametrize("is_mixture", [False, True])
def test_keys_in_both_directions(is_mixture: bool) -> None:
    keys, arch = keys_of(is_mixture=is_mixture), "qwen35moe" if is_mixture else "qwen35"
    assert keys[f"{arch}.attention.recurrent_layers"] == [True, False, True, True]
    assert keys[f"{arch}.full_attention_interval"] == 4
    assert keys[f"{arch}.rope.dimension_count"] == 8
    assert keys[f"{arch}.rope.dimension_sections"] == [11, 11, 10, 0]
    assert [keys[f"{arch}.ssm.{key}"] for key in ("conv_kernel", "state_size", "group_count")] == [4, 32, 2]
    assert [keys[f"{arch}.ssm.{key}"] for key in ("time_step_rank", "inner_size")] == [4, 128]
    assert (f"{arch}.feed_forward_length" in keys) == (not is_mixture)
    dimensions, config = (
        dimensions_from_gguf(keys, 448, frozenset(), "model.gguf"),
        qwen35_config(is_mixture=is_mixture),
    )
    assert dimensions == dimensions_from_config(config)
    entries = config_entries(keys, dimensions.shapes(), "model.gguf")
    for name in ("layer_types", "linear_num_value_heads", "linear_value_head_dim", "linear_conv_kernel_dim"):
        assert entries[name] == config[name]
    assert entries["rope_parameters"] == {**config["rope_parameters"], "mrope_interleaved": True}
    assert ("intermediate_size" in entries) == (not is_mixture)


def test_layers_by_their_interval() -> None:
    config = qwen35_config(full_attention_interval=2)
    del config["layer_types"]
    dimensions = dimensions_from_config(config)
    assert dimensions.delta_net is not None and dimensions.delta_net.layers == {0, 2}
    keys = {key: value.value for key, value in gguf_metadata(config).items()}
    assert "qwen35.attention.recurrent_layers" not in keys
    assert dimensions_from_gguf(keys, 448, frozenset(), "model.gguf") == dimensions


def test_tensors_of_both_kinds_of_layers() -> None:
    shapes = dimensions_from_config(qwen35_config()).shapes()
    of_layers = [{name.split(".", 2)[2] for name in shapes if name.startswith(f"blk.{layer}.")} for layer in range(2)]
    names = ("attn_gate", "attn_qkv", "ssm_alpha", "ssm_beta", "ssm_conv1d", "ssm_norm", "ssm_out")
    assert of_layers[0] - of_layers[1] == {*(f"{name}.weight" for name in names), "ssm_a", "ssm_dt.bias"}
    assert shapes["blk.1.attn_q.weight"] == (256, 128)  # with the gates behind the queries
    assert shapes["blk.0.ssm_conv1d.weight"] == (256, 4)


def test_names_in_both_directions() -> None:
    shapes = dimensions_from_config(qwen35_config()).shapes()
    for name in shapes:
        assert [place.name for place in places_of("qwen35", hf_tensor_name("qwen35", name))] == [name]
    assert hf_tensor_name("qwen35", "blk.0.ssm_a") == "model.layers.0.linear_attn.A_log"
    assert hf_tensor_name("qwen35", "blk.0.ssm_dt.bias") == "model.layers.0.linear_attn.dt_bias"
    assert hf_tensors("qwen35", shapes)["model.layers.0.linear_attn.conv1d.weight"].shape == (256, 1, 4)


def test_value_heads_change_their_order() -> None:
    """The three value heads of two key heads: 0 to 2 and 3 to 5 become 0 3 1 4 2 5, and back."""
    heads = [0, 3, 1, 4, 2, 5]
    vector = np.arange(6)
    np.testing.assert_array_equal(SIZES.order("ssm_dt.bias", vector, to_gguf=True), heads)
    rows = np.repeat(np.arange(6), 32)[:, np.newaxis] * np.ones((1, 3))
    found = SIZES.order("attn_gate", rows, to_gguf=True)
    np.testing.assert_array_equal(found[::32, 0], heads)
    mixed = np.concatenate([np.full((64, 3), -1.0), rows])
    np.testing.assert_array_equal(SIZES.order("attn_qkv", mixed, to_gguf=True), np.concatenate([mixed[:64], found]))
    np.testing.assert_array_equal(SIZES.order("ssm_out", rows.T, to_gguf=True), found.T)
    steps = np.repeat(np.arange(6), 2)[np.newaxis]  # two groups of 16 columns for each head
    np.testing.assert_array_equal(SIZES.order("ssm_out", steps, to_gguf=True)[0, ::2], heads)
    for name, array in (("attn_qkv", mixed), ("ssm_out", rows.T), ("ssm_a", vector), ("attn_q", rows)):
        np.testing.assert_array_equal(SIZES.order(name, SIZES.order(name, array, to_gguf=True), to_gguf=False), array)
    np.testing.assert_array_equal(SIZES.order("attn_q", rows, to_gguf=True), rows)


def test_tensors_in_both_directions() -> None:
    config = qwen35_config()
    delta_net = dimensions_from_config(config).delta_net
    for hf_name, weights in qwen35_weights(config).items():
        (place,) = places_of("qwen35", hf_name)
        array = weights.reshape(weights.shape[0], -1) if hf_name.endswith("conv1d.weight") else weights
        converted = from_hf("qwen35", place.name, array, 4, 2, delta_net)
        back = to_hf("qwen35", place.name, converted, 4, 2, delta_net)
        np.testing.assert_array_equal(back.astype(np.float16), array.astype(np.float16))
        if hf_name.endswith("linear_attn.norm.weight"):
            np.testing.assert_array_equal(converted, array)
        elif hf_name.endswith("norm.weight"):
            np.testing.assert_array_equal(converted, array + 1)


def test_decays_have_the_same_bits_again() -> None:
    """Of A_log in float16, bfloat16 and float32, what comes back gives the same decay."""
    a_log = np.random.default_rng(0).uniform(-6, 4, 20000).astype(np.float32)
    for stored in (a_log, a_log.astype(np.float16).astype(np.float32), (a_log.view(np.uint32) >> 16).astype(np.uint16)):
        decay = decay_from_hf(stored)
        assert (decay < 0).all()
        np.testing.assert_array_equal(decay_from_hf(decay_to_hf(decay)), decay)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"layer_types": ["linear_attention"]}, r"layer_types is \['linear_attention'\], which is no list of 4"),
        ({"layer_types": [*TYPES[:3], "conv"]}, "layer_types is .*, which is no list of 4"),
        ({"layer_types": ["linear_attention"] * 4}, "a model without attention in any layer is not supported"),
        (
            {"layer_types": ["full_attention"] * 4},
            "a model of this family without linear attention in any layer is not supported",
        ),
        ({"linear_conv_kernel_dim": 1}, "a convolution of one tap"),
        ({"linear_conv_kernel_dim": 17}, "linear_conv_kernel_dim is 17, which is not an integer from 1 to 16"),
        ({"linear_num_key_heads": 3}, "4 value heads cannot share 3 key heads evenly"),
        ({"linear_num_key_heads": "2"}, "linear_num_key_heads is '2', which is not an integer"),
        ({"linear_key_head_dim": 24}, "heads of 24 elements in layers with linear attention are not supported"),
        ({"linear_value_head_dim": 48}, "4 heads of 32 elements beside layers with linear attention of 192"),
        ({"rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor is 2.0, which rotates 64 of 32"),
        ({"rope_parameters": {"partial_rotary_factor": "a"}}, "partial_rotary_factor is 'a', which is not a positive"),
        ({"rope_parameters": {"partial_rotary_factor": 0.1}}, "3 of 32 elements of a head cannot be rotated in pairs"),
        ({"attn_output_gate": False}, r"attention without gates \(attn_output_gate\) is not supported"),
        ({"attention_bias": True}, r"biases \(attention_bias\) of a Qwen3_5ForCausalLM are not supported"),
    ],
)
def test_refused_entries(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(TritGgufError, match=f"config.json: {message}"):
        dimensions_from_config(qwen35_config(**entries))


def test_llama_3s_rope_scaling_is_refused() -> None:
    """Its factors would be those of the part of a head that rotates, which no file has."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    with pytest.raises(TritGgufError, match="rope type llama3 is not supported"):
        keys_of(rope_parameters=scaling)


@pytest.mark.parametrize("sections", ["11", [11, "11"], [1] * 5, [-1]])
def test_refused_sections(sections: Any) -> None:
    with pytest.raises(TritGgufError, match=r"config.json: mrope_section is .*, which is no list of up to four counts"):
        keys_of(rope_parameters={"rope_type": "default", "mrope_section": sections})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.recurrent_layers": [True]}, "recurrent_layers is .*, which is no list of 4 flags"),
        ({"attention.recurrent_layers": [1, 0, 1, 1]}, "recurrent_layers is .*, which is no list of 4 flags"),
        ({"attention.recurrent_layers": [True] * 4}, "a model without attention in any layer"),
        ({"attention.recurrent_layers": [False] * 4}, "without linear attention in any layer"),
        ({"ssm.conv_kernel": 0}, "qwen35.ssm.conv_kernel is 0"),
        ({"ssm.inner_size": 130}, "qwen35.ssm.inner_size is 130, which is no multiple of 4 heads"),
        ({"ssm.state_size": None}, "qwen35.ssm.state_size is missing"),
        ({"rope.dimension_count": 64}, "64 of 32 elements of a head cannot be rotated"),
        ({"nextn_predict_layers": 1}, r"layers that predict further tokens \(nextn_predict_layers\)"),
    ],
)
def test_refused_keys(changes: dict[str, Any], message: str) -> None:
    keys = {**keys_of(), **{f"qwen35.{key}": value for key, value in changes.items()}}
    with pytest.raises(TritGgufError, match=f"model.gguf: .*{message}"):
        dimensions_from_gguf(keys, 448, frozenset(), "model.gguf")


@pytest.mark.parametrize("name", ["attn_q", "attn_qkv", "attn_gate", "ssm_out"])
def test_biases_of_matrices_that_some_layers_have_are_refused(name: str) -> None:
    with pytest.raises(TritGgufError, match=f"model.gguf: biases of {name} are not supported beside layers of another"):
        dimensions_from_gguf(keys_of(), 448, frozenset({name}), "model.gguf")

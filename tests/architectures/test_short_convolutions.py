"""LFM2's config.json and keys: its own names, the kinds of its layers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_convolutions import TYPES, lfm2_config

from tritgguf.architectures.dimensions import dimensions_from_config, dimensions_from_gguf
from tritgguf.architectures.gguf_to_hf import config_entries
from tritgguf.architectures.hf_to_gguf import gguf_metadata, is_tied
from tritgguf.architectures.short_convolutions import ShortConvolutions
from tritgguf.architectures.table import ARCHITECTURES
from tritgguf.errors import TritGgufError

KV_HEADS = "lfm2.attention.head_count_kv"


def keys_of(**entries: Any) -> dict[str, Any]:
    return {key: value.value for key, value in gguf_metadata(lfm2_config(**entries)).items()}


def test_the_first_published_layout() -> None:
    """LFM2-1.2B's: indices of the attention layers, and a width that is adjusted."""
    config = lfm2_config(block_ff_dim=12288, block_ffn_dim_multiplier=1.0, block_multiple_of=256, full_attn_idxs=[1])
    for entry in ("layer_types", "intermediate_size", "tie_word_embeddings"):
        del config[entry]
    config |= {"block_auto_adjust_ff_dim": True, "tie_embedding": False}
    dimensions = dimensions_from_config(config)
    assert dimensions.feed_forward == 8192
    assert dimensions.convolutions == ShortConvolutions(frozenset([0, 2, 3]), 3)
    assert not is_tied(config, ARCHITECTURES["Lfm2ForCausalLM"])
    assert is_tied({}, ARCHITECTURES["Lfm2ForCausalLM"])


@pytest.mark.parametrize(
    ("factor", "multiple", "width"), [(None, 256, 1333), (1.0, 256, 1536), (1.5, 64, 2048), (1.0, 1, 1333)]
)
def test_adjusted_widths(factor: float | None, multiple: int, width: int) -> None:
    config = lfm2_config(intermediate_size=2000, block_auto_adjust_ff_dim=True, block_ffn_dim_multiplier=factor)
    assert dimensions_from_config({**config, "block_multiple_of": multiple}).feed_forward == width


def test_keys_in_both_directions() -> None:
    keys = keys_of(conv_L_cache=4, norm_eps=2e-5)
    assert keys[KV_HEADS] == [0, 2, 0, 0]
    assert keys["lfm2.shortconv.l_cache"] == 4
    assert keys["lfm2.vocab_size"] == 448
    dimensions = dimensions_from_gguf(keys, 448, frozenset(), "model.gguf")
    assert dimensions == dimensions_from_config(lfm2_config(conv_L_cache=4))
    entries = config_entries(keys, dimensions.shapes(), "model.gguf")
    assert entries["layer_types"] == list(TYPES)
    assert entries["conv_L_cache"] == 4
    assert entries["norm_eps"] == 1e-5 and "rms_norm_eps" not in entries
    assert entries["block_auto_adjust_ff_dim"] is False


def test_tensors_of_both_kinds_of_layers() -> None:
    shapes = dimensions_from_config(lfm2_config()).shapes()
    of_layers = [{name.split(".", 2)[2] for name in shapes if name.startswith(f"blk.{layer}.")} for layer in range(2)]
    assert of_layers[0] - of_layers[1] == {f"shortconv.{name}.weight" for name in ("in_proj", "conv", "out_proj")}
    assert shapes["blk.0.shortconv.in_proj.weight"] == (384, 128)
    assert shapes["token_embd_norm.weight"] == (128,)
    assert not any(name.startswith("output_norm") for name in shapes)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"conv_bias": True}, r"biases of convolutions \(conv_bias\) are not supported"),
        ({"layer_types": ["conv"]}, r"layer_types is \['conv'\], which is no list of 4"),
        ({"layer_types": [*TYPES[:3], "sliding_attention"]}, r"layer_types is .*, which is no list of 4"),
        ({"layer_types": 5}, r"layer_types is 5, which is no list of 4"),
        ({"layer_types": ["conv"] * 4}, "a model without attention in any layer is not supported"),
        ({"conv_L_cache": 17}, "conv_L_cache is 17, which is not an integer from 1 to 16"),
        ({"conv_L_cache": "3"}, "conv_L_cache is '3', which is not an integer"),
        ({"head_dim": 64}, "4 heads of 64 elements beside convolutions of 128 channels"),
        ({"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": -1}, "block_ffn_dim_multiplier is -1"),
        ({"block_auto_adjust_ff_dim": True, "block_multiple_of": 0}, "block_multiple_of is 0"),
    ],
)
def test_refused_entries(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(TritGgufError, match=f"config.json: {message}"):
        dimensions_from_config(lfm2_config(**entries))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({KV_HEADS: 2}, f"{KV_HEADS} is 2, which is no list of 4 equal numbers"),
        ({KV_HEADS: [0, 2, 0]}, f"{KV_HEADS} is .*, which is no list of 4 equal numbers"),
        ({KV_HEADS: [0, 2, 0, 1]}, f"{KV_HEADS} is .*, which is no list of 4 equal numbers"),
        ({KV_HEADS: [0, -2, 0, 0]}, f"{KV_HEADS} is .*, which is no list of 4 equal numbers"),
        ({KV_HEADS: ["a", "b", "c", "d"]}, f"{KV_HEADS} is .*, which is no list of 4 equal numbers"),
        ({KV_HEADS: [0, 0, 0, 0]}, f"{KV_HEADS} is .*, which is no list of 4 equal numbers"),
        ({"lfm2.shortconv.l_cache": 0}, r"lfm2.shortconv.l_cache is 0, which is not an integer from 1 to 16"),
        ({"lfm2.attention.sliding_window": 64}, r"a sliding window \(lfm2.attention.sliding_window\) is not supported"),
    ],
)
def test_refused_keys(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TritGgufError, match=f"model.gguf: {message}"):
        dimensions_from_gguf({**keys_of(), **changes}, 448, frozenset(), "model.gguf")


@pytest.mark.parametrize("name", ["attn_q", "attn_output", "shortconv.in_proj", "shortconv.out_proj"])
def test_biases_of_matrices_that_some_layers_have_are_refused(name: str) -> None:
    with pytest.raises(TritGgufError, match=f"model.gguf: biases of {name} are not supported beside layers of another"):
        dimensions_from_gguf(keys_of(), 448, frozenset({name}), "model.gguf")
    assert "ffn_up" in dimensions_from_gguf(keys_of(), 448, frozenset({"ffn_up"}), "model.gguf").biased

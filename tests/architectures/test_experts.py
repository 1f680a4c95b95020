"""Mixtures of experts: tensor names in every layout, sizes and keys."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
from model_keys import values_of
from tiny_mixtures import KINDS, mixture_config, mixture_weights

from tritgguf.architectures import dimensions, gguf_to_hf, tensor_names
from tritgguf.errors import TritGgufError

ARCHITECTURES = {
    "qwen3": gguf.MODEL_ARCH.QWEN3MOE,
    "qwen2": gguf.MODEL_ARCH.QWEN2MOE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "granite": gguf.MODEL_ARCH.GRANITE_MOE,
    "gpt-oss": gguf.MODEL_ARCH.GPT_OSS,
    "phimoe": gguf.MODEL_ARCH.PHIMOE,
}


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_have_llama_cpps_names(kind: str) -> None:
    arch = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]]
    known = {gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in gguf.MODEL_TENSORS[ARCHITECTURES[kind]]}
    sizes = dimensions.dimensions_from_config(mixture_config(kind))
    assert sizes.architecture == arch
    names = [name for name in sizes.shapes() if name.startswith("blk.0.")]
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in names} <= known
    assert len([name for name in names if name.endswith("_exps.weight")]) == 3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_checkpoint_has_a_place(kind: str, fused: bool) -> None:
    sizes = dimensions.dimensions_from_config(mixture_config(kind))
    weights = mixture_weights(kind, mixture_config(kind), fused=fused)
    places = {name: tensor_names.places_of(sizes.architecture, name) for name in weights}
    assert all(places.values())
    found = [(place.name, place.part) for of_tensor in places.values() for place in of_tensor]
    assert len(set(found)) == len(found)
    assert {name.split("[")[0] for name, _ in found} == set(sizes.shapes())
    if not fused:
        stored = tensor_names.hf_tensors(sizes.architecture, sizes.shapes())
        assert {name: tensor.shape for name, tensor in stored.items()} == {
            name: value.shape for name, value in weights.items()
        }
    else:
        parameters = {tensor_names.module_parameter(sizes.architecture, name) for name in sizes.shapes()}
        assert {name for name, _ in parameters} == set(weights)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.7.ffn_up_exps.weight[3]", "model.layers.7.mlp.experts.3.up_proj.weight"),
        ("blk.7.ffn_up_exps.weight", "model.layers.7.mlp.experts.*.up_proj.weight"),
        ("blk.7.ffn_gate_inp.weight", "model.layers.7.mlp.gate.weight"),
    ],
)
def test_a_matrix_has_the_name_of_its_tensor(name: str, expected: str) -> None:
    assert tensor_names.hf_tensor_name("qwen3moe", name) == expected


def test_biases_of_experts_have_no_counterpart() -> None:
    with pytest.raises(TritGgufError, match="has no counterpart"):
        tensor_names.hf_tensor_name("qwen3moe", "blk.0.ffn_up_exps.bias")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_unpacked_tensors(kind: str) -> None:
    shapes = dimensions.dimensions_from_config(mixture_config(kind)).shapes()
    in_layer = [name for name in shapes if name.startswith("blk.1.") and len(shapes[name]) > 1]
    packed = {name for name in in_layer if tensor_names.quantized_tensor(name)}
    kept = {name for name in in_layer if tensor_names.kept_in_float32(name)}
    biases = {f"blk.1.ffn_{part}_exps.bias" for part in ("gate", "up", "down")} if kind == "gpt-oss" else set()
    assert kept == {"blk.1.ffn_gate_inp.weight", *biases}
    assert packed == set(in_layer) - kept


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        *((kind, {}) for kind in KINDS),
        ("qwen3", {"norm_topk_prob": False}),
        ("qwen2", {"norm_topk_prob": True}),
        ("granite", {"shared_intermediate_size": 0}),
        ("mixtral", {"sliding_window": 64}),
        ("gpt-oss", {"sliding_window": 64}),
        ("phimoe", {"sliding_window": 64, "lm_head_bias": False, "attention_bias": False}),
    ],
)
def test_keys_lead_back(kind: str, entries: dict[str, Any]) -> None:
    config = mixture_config(kind, **entries)
    sizes = dimensions.dimensions_from_config(config)
    keys = values_of(config)
    found = dimensions.dimensions_from_gguf(keys, sizes.vocabulary, sizes.biased, "model.gguf")
    assert found == sizes
    assert sizes.experts is not None
    assert sizes.experts.count == 4
    assert sizes.experts.used == 2
    again = gguf_to_hf.config_entries(keys, sizes.shapes(), "model.gguf")
    of_experts = {name for name in config if "expert" in name or "shared" in name or name.startswith(("moe", "norm_t"))}
    if entries.get("shared_intermediate_size") == 0:
        of_experts.remove("shared_intermediate_size")  # it becomes the class without a shared expert
    assert {name: again[name] for name in of_experts} == {name: config[name] for name in of_experts}


def test_weights_are_normalized_as_the_config_says() -> None:
    for kind, entries, expected, key in (
        ("qwen3", {}, True, None),
        ("qwen3", {"norm_topk_prob": False}, False, False),
        ("qwen2", {}, False, None),
        ("qwen2", {"norm_topk_prob": True}, True, True),
        ("mixtral", {}, True, None),
    ):
        config = mixture_config(kind, **entries)
        sizes, keys = dimensions.dimensions_from_config(config), values_of(config)
        assert sizes.experts is not None
        assert sizes.experts.normalizes is expected
        assert keys.get(f"{sizes.architecture}.expert_weights_norm") is key


def test_older_files_lack_the_widths() -> None:
    """llama.cpp's defaults: the dense width divided by the experts that a token uses."""
    keys = values_of(mixture_config("qwen2"))
    for name in ("expert_feed_forward_length", "expert_shared_feed_forward_length"):
        del keys[f"qwen2moe.{name}"]
    experts = dimensions.dimensions_from_gguf(keys, 448, frozenset(), "model.gguf").experts
    assert experts is not None
    assert (experts.width, experts.shared_width) == (96, 192)


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok is 3, but SparseMixer chooses 2"),
        ("phimoe", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1, but only 0.01 is supported"),
        ("phimoe", {"mlp_bias": True}, r"biases \(mlp_bias\) of a PhiMoEForCausalLM are not supported"),
        ("mixtral", {"intermediate_size": 40}, "experts of 40 rows are not supported, only multiples of 16"),
        ("mixtral", {"lm_head_bias": True}, r"biases \(lm_head_bias\) of a MixtralForCausalLM are not supported"),
    ],
)
def test_what_other_models_of_a_family_have_is_refused(kind: str, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(TritGgufError, match=message):
        dimensions.dimensions_from_config(mixture_config(kind, **entries))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("expert_used_count", r"phimoe\.expert_used_count is 1, but SparseMixer chooses 2"),
        ("expert_gating_func", r"phimoe\.expert_gating_func is 1, but SparseMixer has weights of its own"),
    ],
)
def test_a_file_for_sparse_mixer_has_two_experts_of_a_token_and_its_weights(key: str, message: str) -> None:
    keys = {**values_of(mixture_config("phimoe")), f"phimoe.{key}": 1}
    with pytest.raises(TritGgufError, match=message):
        dimensions.dimensions_from_gguf(keys, 448, frozenset(), "model.gguf")

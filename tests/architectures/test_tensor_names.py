"""Tensor names in Hugging Face and GGUF, and the order of rows."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_keys import config_of
from tiny_models import random_weights

from tritgguf.architectures import dimensions, tensor_names
from tritgguf.architectures.rope import ROPE_FREQS
from tritgguf.errors import TritGgufError


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

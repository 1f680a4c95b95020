"""Ids, sizes and names of the trit types, and their registration with gguf-py."""

from __future__ import annotations

import gguf
import pytest

from cpu_kernels.layout import BLOCK_SIZE, CODEBOOK_SIZE, GROUP_SIZE, WORDS_PER_BLOCK
from tritgguf import trit_types
from tritgguf.trit_types import DEPTHS, TritType


@pytest.mark.parametrize(
    ("depth", "type_id", "n_bytes"), [(1, 10001, 16), (2, 10002, 28), (3, 10003, 42), (4, 10004, 54)]
)
def test_the_formats_table(depth: int, type_id: int, n_bytes: int) -> None:
    trit_type = TritType.of_depth(depth)
    assert (trit_type.name, trit_type.value, trit_type.depth) == (f"TRIT{depth}", type_id, depth)
    assert trit_types.block_bytes(depth) == n_bytes
    assert trit_types.row_bytes(depth, 64) == n_bytes
    assert trit_types.row_bytes(depth, 576) == 9 * n_bytes
    assert trit_types.is_trit_type(type_id)


@pytest.mark.parametrize("depth", [0, 5, -1])
def test_no_other_depth_exists(depth: int) -> None:
    assert depth not in DEPTHS
    with pytest.raises(ValueError):
        TritType.of_depth(depth)


@pytest.mark.parametrize("type_id", [0, 1, 10000, 10005, -1])
def test_other_types_are_no_trit_types(type_id: int) -> None:
    assert not trit_types.is_trit_type(type_id)


def test_format_and_kernels_agree() -> None:
    assert trit_types.BLOCK_SIZE == BLOCK_SIZE
    assert trit_types.GROUP_SIZE == GROUP_SIZE
    assert trit_types.CODEBOOK_SIZE == CODEBOOK_SIZE == 3**trit_types.SCALE_DEPTH
    assert {depth: trit_types.block_bytes(depth) for depth in DEPTHS} == {
        depth: 2 * words for depth, words in WORDS_PER_BLOCK.items()
    }


def test_codebook_key() -> None:
    assert trit_types.codebook_key("blk.0.attn_q.weight") == "trit.codebook.blk.0.attn_q.weight"


def test_registration_teaches_gguf_the_types() -> None:
    trit_types.register_with_gguf()
    stock = len(gguf.GGMLQuantizationType)
    trit_types.register_with_gguf()
    assert len(gguf.GGMLQuantizationType) == stock
    for depth in DEPTHS:
        member = gguf.GGMLQuantizationType(10000 + depth)
        assert member.name == f"TRIT{depth}"
        assert gguf.GGMLQuantizationType[f"TRIT{depth}"] is member
        assert gguf.GGML_QUANT_SIZES[member] == (64, trit_types.block_bytes(depth))
        assert gguf.quant_shape_to_byte_shape((5, 128), member) == (5, 2 * trit_types.block_bytes(depth))
    with pytest.raises(ValueError):
        gguf.GGMLQuantizationType(10005)


def test_registration_leaves_stock_types_alone() -> None:
    trit_types.register_with_gguf()
    assert gguf.GGMLQuantizationType(0).name == "F32"
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_0] == (32, 18)

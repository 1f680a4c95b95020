"""Ids, sizes and names of the trit types, and their registration with gguf-py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import trit_bytes

from cpu_kernels.packed_rows.layout import BLOCK_SIZE, CODEBOOK_SIZE, GROUP_SIZE, WORDS_PER_BLOCK
from tritgguf.formats import trit_types
from tritgguf.formats.trit_types import DEPTHS, TritType


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


# -- in a new process, where nothing is imported yet

DUMP = "from gguf.scripts.gguf_dump import main; main()"


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("imports", ["import tritgguf, gguf", "import gguf, tritgguf"])
def test_the_reader_knows_the_types_once_the_package_is_imported(tmp_path: Path, imports: str) -> None:
    path = trit_bytes(depth=3).write(tmp_path / "trit.gguf")
    code = f"{imports}; import sys; print([t.tensor_type.name for t in gguf.GGUFReader(sys.argv[1]).tensors])"
    result = run_python(code, str(path))
    assert (result.stdout, result.returncode) == ("['TRIT3', 'F32']\n", 0), result.stderr


def test_gguf_dump_prints_the_types_once_the_package_is_imported(tmp_path: Path) -> None:
    path = trit_bytes(depth=3).write(tmp_path / "trit.gguf")
    result = run_python(f"import tritgguf; {DUMP}", str(path))
    assert result.returncode == 0, result.stderr
    assert "TRIT3   | w" in result.stdout
    assert "trit.codebook.w" in result.stdout


def test_without_the_package_the_reader_names_the_type_id(tmp_path: Path) -> None:
    result = run_python(DUMP, str(trit_bytes(depth=3).write(tmp_path / "trit.gguf")))
    assert result.returncode == 1
    assert "10003) is not a valid GGMLQuantizationType" in result.stderr.splitlines()[-1]


def test_importing_the_package_does_not_import_gguf() -> None:
    result = run_python("import sys, tritgguf; print(sorted({'gguf', 'numpy', 'numba'} & set(sys.modules)))")
    assert result.stdout == "[]\n", result.stderr


def test_gguf_cannot_dequantize_without_a_codebook() -> None:
    trit_types.register_with_gguf()
    packed = np.zeros((1, trit_types.block_bytes(2)), np.uint8)
    with pytest.raises(NotImplementedError, match="TRIT2"):
        gguf.dequantize(packed, gguf.GGMLQuantizationType(10002))

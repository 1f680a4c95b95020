"""docs/trit_reference.c against docs/reference_decoder.py, bit for bit; both are written from docs/format.md alone."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_decoding import (
    CODEBOOKS,
    DEPTH_OF_TYPE_ID,
    DEPTHS,
    DOCS,
    WORDS_PER_BLOCK,
    assert_same_bits,
    decode,
    draw_bytes,
)

from tritgguf.formats.gguf_file import GgufFile

SOURCE = DOCS / "trit_reference.c"
FLAGS = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2", "-ffp-contract=off")
FIRST_ROWS = 4


class CReference:
    """The compiled C functions with NumPy arrays as arguments."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.trit_row_bytes.argtypes = (ctypes.c_int, ctypes.c_size_t)
        self._library.trit_row_bytes.restype = ctypes.c_size_t
        floats: Any = np.ctypeslib.ndpointer(np.float32, flags="C")
        self._library.trit_codebook_of.argtypes = (ctypes.c_size_t, ctypes.c_size_t, floats, ctypes.c_size_t)
        self._library.trit_codebook_of.restype = ctypes.c_void_p
        row = (ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p)
        self._library.trit_decode_row.argtypes = (*row, floats, floats)
        self._library.trit_dot_row.argtypes = (*row, floats, floats, floats)

    def row_bytes(self, depth: int, columns: int) -> int:
        return int(self._library.trit_row_bytes(depth, columns))

    def decode(self, packed: np.ndarray, columns: int, depth: int, codebook: np.ndarray) -> np.ndarray:
        """Return float32 [rows, columns] of uint8 [rows, bytes]."""
        weights = np.full((len(packed), columns), np.nan, np.float32)
        for row, out in zip(packed, weights, strict=True):
            assert self._library.trit_decode_row(depth, columns, row.tobytes(), codebook, out) == 0
        return weights

    def codebook_of(self, row: int, rows: int, codebooks: np.ndarray) -> int | None:
        """Return where the codebook of a row begins in float32 [entries]; None if it has none."""
        address = self._library.trit_codebook_of(row, rows, codebooks, len(codebooks))
        return None if address is None else (address - codebooks.ctypes.data) // 4

    def decode_stack(self, packed: np.ndarray, columns: int, depth: int, codebooks: np.ndarray) -> np.ndarray:
        """Return float32 [matrices * rows, columns] of uint8 [matrices, rows, bytes] and float32 [27 * matrices]."""
        matrices, rows, _ = packed.shape
        weights = []
        for r, row in enumerate(packed.reshape(matrices * rows, -1)):
            place = self.codebook_of(r, rows, codebooks)
            assert place is not None
            weights.append(self.decode(row[np.newaxis], columns, depth, codebooks[place : place + 27].copy())[0])
        return np.array(weights)

    def dot(self, row: np.ndarray, depth: int, codebook: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return float32 [1]: a row, uint8 [bytes], times float32 [columns]."""
        product = np.full(1, np.nan, np.float32)
        assert self._library.trit_dot_row(depth, len(x), row.tobytes(), codebook, x, product) == 0
        return product

    def refuses(self, depth: int, columns: int) -> bool:
        """Tell whether both functions return an error and write nothing."""
        row, codebook, out = b"", np.ones(27, np.float32), np.full(1, 7, np.float32)
        codes = (
            self._library.trit_decode_row(depth, columns, row, codebook, out),
            self._library.trit_dot_row(depth, columns, row, codebook, out, out),
        )
        return codes == (-1, -1) and out[0] == 7


def compiler() -> str:
    found = shutil.which("cc")
    if found is None:
        pytest.skip("there is no C compiler (cc) here to compile docs/trit_reference.c with")
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> CReference:
    library = tmp_path_factory.mktemp("c_reference") / "trit_reference.so"
    subprocess.run([compiler(), *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(library)], check=True)
    return CReference(library)


def expected_dot(row: np.ndarray, depth: int, codebook: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return float32 [1]: section 5 in float64, summed in order (cumsum)."""
    levels, indices = naive.unpack_row(row.tobytes(), depth, len(x) // 16)
    h = (3**depth - 1) // 2
    steps = (codebook / np.float32(h))[indices].astype(np.float64)
    products = (levels.astype(np.float64) - h).reshape(-1, 16) * x.astype(np.float64).reshape(-1, 16)
    groups = np.cumsum(np.pad(products, ((0, 0), (1, 0))), axis=1)[:, -1]
    return np.cumsum(np.pad(steps * groups, (1, 0)))[-1:].astype(np.float32)


def test_the_file_is_short_and_checks_itself(tmp_path: Path) -> None:
    assert len(SOURCE.read_text(encoding="utf-8").splitlines()) < 300
    program = tmp_path / "trit_reference"
    subprocess.run([compiler(), *FLAGS, "-DTRIT_REFERENCE_MAIN", str(SOURCE), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines() == [f"TRIT{depth}: as stated in section 6" for depth in DEPTHS]


def test_its_head_names_every_function(reference: CReference) -> None:
    text = SOURCE.read_text(encoding="utf-8")
    assert set(re.findall(r"\btrit_\w+_row\(", text.partition("*/")[0])) == {"trit_decode_row(", "trit_dot_row("}


@pytest.mark.parametrize("depth", DEPTHS)
@given(data=st.data(), rows=st.integers(1, 3), blocks=st.integers(1, 5), codebook=CODEBOOKS)
def test_arbitrary_bytes_decode_alike(
    reference: CReference, depth: int, data: st.DataObject, rows: int, blocks: int, codebook: np.ndarray
) -> None:
    columns = 64 * blocks
    packed = draw_bytes(data, rows, reference.row_bytes(depth, columns))
    with np.errstate(over="ignore"):  # a scale next to float32's limit
        expected = decode(packed.tobytes(), columns, depth, codebook)
    assert_same_bits(reference.decode(packed, columns, depth, codebook), expected)


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_word_in_every_place_decodes_alike(reference: CReference, depth: int) -> None:
    every_word = np.tile(np.arange(65536, dtype="<u2")[:, None], (1, WORDS_PER_BLOCK[depth]))
    packed = np.random.default_rng(depth).permuted(every_word, axis=0).view(np.uint8)
    codebook = np.linspace(0.01, 0.27, 27, dtype=np.float32)
    assert_same_bits(reference.decode(packed, 64, depth, codebook), decode(packed, 64, depth, codebook))


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_stack_decodes_alike(reference: CReference, depth: int) -> None:
    generator = np.random.default_rng(depth)
    packed = generator.integers(0, 256, (3, 5, reference.row_bytes(depth, 128)), dtype=np.uint8)
    for codebooks in (generator.random(81, np.float32), generator.random(27, np.float32)):
        expected = decode(packed.tobytes(), 128, depth, codebooks)
        assert_same_bits(reference.decode_stack(packed, 128, depth, codebooks), expected)


def test_codebooks_of_a_wrong_length(reference: CReference) -> None:
    codebooks = np.ones(81, np.float32)
    assert [reference.codebook_of(row, 5, codebooks) for row in (0, 4, 5, 14, 15)] == [0, 0, 27, 54, None]
    assert reference.codebook_of(0, 0, codebooks) is None
    assert reference.codebook_of(0, 5, codebooks[:80]) is None
    assert reference.codebook_of(99, 5, codebooks[:27]) == 0


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("columns", [64, 576, 1536])
def test_dot_product(reference: CReference, depth: int, columns: int) -> None:
    generator = np.random.default_rng((depth, columns))
    codebook = np.geomspace(0.001, 1, 27).astype(np.float32)
    for _ in range(20):
        row = generator.integers(0, 256, reference.row_bytes(depth, columns), dtype=np.uint8)
        x = generator.standard_normal(columns).astype(np.float32)
        x[generator.integers(columns)] *= 1000
        product = reference.dot(row, depth, codebook, x)
        assert_same_bits(product, expected_dot(row, depth, codebook, x))
        weights = decode(row.tobytes(), columns, depth, codebook)[0].astype(np.float64)
        assert abs(product[0] - weights @ x) <= 1e-6 * (np.abs(weights) @ np.abs(x))


@pytest.mark.parametrize(("depth", "columns"), [(0, 64), (5, 64), (-1, 64), (2, 0), (2, 63), (3, 96)])
def test_what_no_tensor_can_have_is_refused(reference: CReference, depth: int, columns: int) -> None:
    assert reference.row_bytes(depth, columns) == 0
    assert reference.refuses(depth, columns)


@pytest.mark.parametrize("depth", DEPTHS)
def test_row_bytes(reference: CReference, depth: int) -> None:
    assert [reference.row_bytes(depth, columns) for columns in (64, 576)] == [
        2 * WORDS_PER_BLOCK[depth],
        18 * WORDS_PER_BLOCK[depth],
    ]


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_trit_tensor_of_a_model_decodes_alike(
    reference: CReference, depth: int, trit_file: Callable[[int], Path]
) -> None:
    file = GgufFile(trit_file(depth))
    trit_tensors = [info for info in file.tensors.values() if info.type_id in DEPTH_OF_TYPE_ID]
    assert {DEPTH_OF_TYPE_ID[info.type_id] for info in trit_tensors} == {depth}
    for info in trit_tensors:
        rows, columns = info.shape
        packed = file.raw(info.name).reshape(rows, -1)[:FIRST_ROWS]
        codebook = file.codebook(info.name)
        assert_same_bits(
            reference.decode(packed, columns, depth, codebook), decode(packed.tobytes(), columns, depth, codebook)
        )
        x = np.random.default_rng(rows).standard_normal(columns).astype(np.float32)
        assert_same_bits(reference.dot(packed[0], depth, codebook, x), expected_dot(packed[0], depth, codebook, x))

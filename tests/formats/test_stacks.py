"""Stacks of matrices in a file: names, codebooks of every matrix, decoding, damage."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import floats, stack_bytes
from reference_decoding import decode

from tritgguf.errors import DamagedFileError
from tritgguf.formats.description import describe
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.integrity import check
from tritgguf.formats.stacks import matrix_names, matrix_shape, split_matrix_name
from tritgguf.formats.trit_types import register_with_gguf

MATRICES, ROWS, COLUMNS, DEPTH = 3, 5, 128, 2
BOOKS = np.sort(np.random.default_rng(0).random((MATRICES, 27), np.float32))


def of_length(entries: int) -> bytes:
    return floats(np.resize(BOOKS, entries).tolist())


def test_names_of_matrices() -> None:
    assert matrix_names("w", (5,)) == matrix_names("w", (3, 5)) == ["w"]
    assert matrix_names("w", (2, 3, 5)) == ["w[0]", "w[1]"]
    assert matrix_names("w", (1, 3, 5)) == ["w[0]"]
    assert matrix_shape((2, 3, 5)) == (3, 5)
    assert matrix_shape((5,)) == (1, 5)
    assert split_matrix_name("blk.0.w.weight[12]") == ("blk.0.w.weight", 12)
    for name in ("blk.0.w.weight", "w[01]", "w[-1]", "w[]", "[3]", "w[9999999999]"):
        assert split_matrix_name(name) == (name, None)


@pytest.mark.parametrize("own", [True, False])
def test_every_matrix_has_its_codebook(tmp_path: Path, own: bool) -> None:
    books = BOOKS if own else np.broadcast_to(BOOKS[0], BOOKS.shape)
    path = stack_bytes(of_length(27 * (MATRICES if own else 1))).write(tmp_path / "a.gguf")
    file = GgufFile(path)
    np.testing.assert_array_equal(file.codebooks("w"), books)
    expected = np.concatenate(
        [
            decode(part, COLUMNS, DEPTH, book)
            for part, book in zip(file.raw("w").reshape(MATRICES, -1), books, strict=True)
        ]
    )
    np.testing.assert_array_equal(file.read_float32("w"), expected.reshape(MATRICES, ROWS, COLUMNS))
    for first, last in ((0, 1), (4, 6), (3, 15), (10, 15), (14, 15)):
        np.testing.assert_array_equal(file.read_rows("w", first, last), expected[first:last])
    assert check(path).trit_tensors == 1
    (described,) = describe(path).tensors
    assert (described.matrices, described.shape) == (MATRICES, (MATRICES, ROWS, COLUMNS))
    assert described.codebook == tuple(books[: MATRICES if own else 1].reshape(-1).tolist())
    with pytest.raises(ValueError, match="is a stack of 3 matrices"):
        file.codebook("w")
    file.release("w", 1)
    file.release("w")
    np.testing.assert_array_equal(file.read_rows("w", 0, 15), expected)


def test_gguf_pys_reader_knows_stacks(tmp_path: Path) -> None:
    register_with_gguf()
    (found,) = gguf.GGUFReader(stack_bytes(of_length(81)).write(tmp_path / "a.gguf")).tensors
    assert (found.tensor_type.name, found.data.shape) == ("TRIT2", (MATRICES, ROWS, 56))


@pytest.mark.parametrize("entries", [0, 26, 28, 54, 80, 82, 108])
def test_another_number_of_scales_is_damage(tmp_path: Path, entries: int) -> None:
    path = stack_bytes(of_length(entries)).write(tmp_path / "a.gguf")
    for read in (lambda: GgufFile(path).codebooks("w"), lambda: check(path), lambda: describe(path)):
        with pytest.raises(DamagedFileError, match="no codebook of 27 entries for each of its 3 matrices"):
            read()


def test_a_codebook_of_a_later_matrix_is_checked(tmp_path: Path) -> None:
    books = BOOKS.copy()
    books[2, :2] = books[2, 1::-1]
    with pytest.raises(DamagedFileError, match="is not ascending"):
        check(stack_bytes(floats(books.reshape(-1).tolist())).write(tmp_path / "a.gguf"))
    for bad in (np.nan, np.inf, -1.0):
        books[2, 5] = bad
        with pytest.raises(DamagedFileError, match="not a list of scales"):
            check(stack_bytes(floats(books.reshape(-1).tolist())).write(tmp_path / "a.gguf"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1 << 60, 5, 128), "reaches beyond the end"),
        ((1 << 40, 1 << 40, 128), "reaches beyond the end"),
        ((0, 5, 128), "does not allow"),
        ((3, 0, 128), "does not allow"),
        ((3, 5, 96), "does not allow"),
        ((4, 5, 128), "reaches beyond the end"),
    ],
)
def test_a_hostile_shape(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(DamagedFileError, match=message):
        GgufFile(stack_bytes(of_length(81), shape).write(tmp_path / "a.gguf"))

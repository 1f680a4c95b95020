"""The bytes of metadata are those that gguf-py's writer makes."""

from __future__ import annotations

import io
from typing import Any

import pytest
from gguf import GGUFValue, GGUFValueType, GGUFWriter
from gguf.gguf_writer import WriterState
from hypothesis import given
from hypothesis import strategies as st

from tritgguf.formats.metadata_bytes import encoded_metadata

NUMBERS: dict[GGUFValueType, st.SearchStrategy[Any]] = {
    **{
        getattr(GGUFValueType, f"UINT{bits}"): st.integers(min_value=0, max_value=2**bits - 1)
        for bits in (8, 16, 32, 64)
    },
    **{
        getattr(GGUFValueType, f"INT{bits}"): st.integers(min_value=-(2 ** (bits - 1)), max_value=2 ** (bits - 1) - 1)
        for bits in (8, 16, 32, 64)
    },
    GGUFValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    GGUFValueType.FLOAT64: st.floats(allow_nan=False),
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.STRING: st.text(st.characters(exclude_categories=["Cs"])),
}


@st.composite
def values(draw: st.DrawFn) -> GGUFValue:
    kind = draw(st.sampled_from(list(NUMBERS)))
    if draw(st.booleans()):
        return GGUFValue(draw(NUMBERS[kind]), kind)
    return GGUFValue(draw(st.lists(NUMBERS[kind], min_size=1)), GGUFValueType.ARRAY, kind)


def by_gguf_py(metadata: dict[str, GGUFValue]) -> bytes:
    writer, buffer = GGUFWriter(None, "llama"), io.BytesIO()
    writer.kv_data[0] = metadata
    writer.fout, writer.state = [buffer], WriterState.HEADER  # type: ignore[list-item]
    writer.write_kv_data_to_file()
    return buffer.getvalue()


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), values(), max_size=4))
def test_every_type_is_encoded_as_gguf_py_encodes_it(metadata: dict[str, GGUFValue]) -> None:
    assert encoded_metadata(metadata) == by_gguf_py(metadata)


@pytest.mark.parametrize("items", [["a", "é", ""], [1, -2], [0.5, 1.0], [True, False], b"bytes", [[1, 2], [3]], [b"a"]])
def test_the_type_of_an_array_s_items_is_found(items: Any) -> None:
    metadata = {"an.array": GGUFValue(items, GGUFValueType.ARRAY)}
    assert encoded_metadata(metadata) == by_gguf_py(metadata)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (GGUFValue([], GGUFValueType.ARRAY), "no empty arrays"),
        (GGUFValue([1, "a"], GGUFValueType.ARRAY), "different types"),
        (GGUFValue(300, GGUFValueType.UINT8), "300"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(value: GGUFValue, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded_metadata({"a.key": value})

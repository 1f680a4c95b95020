"""The tokens of a forward pass: in the order of their chunks, with their places and outputs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tritgguf.runtime.token_batch import TokenBatch

Chunk = tuple[int, int, list[int], int]


@st.composite
def chunk_lists(draw: st.DrawFn) -> list[Chunk]:
    chunks = []
    for sequence in draw(st.lists(st.integers(0, 5), min_size=1, max_size=6)):
        tokens = draw(st.lists(st.integers(0, 99), min_size=1, max_size=7))
        chunks.append((sequence, draw(st.integers(0, 9)), tokens, draw(st.integers(0, len(tokens)))))
    return chunks


def test_a_batch_of_two_prompts_and_an_answer() -> None:
    batch = TokenBatch.of_chunks([(3, 10, [7, 8, 9], 2), (1, 0, [5, 6], 0), (2, 40, [4], 1)], 2)
    assert batch.tokens.tolist() == [7, 8, 9, 5, 6, 4]
    assert batch.positions.tolist() == [10, 11, 12, 0, 1, 40]
    assert batch.sequences.tolist() == [3, 3, 3, 1, 1, 2]
    assert batch.prompt_tokens == 5
    assert batch.outputs.tolist() == [1, 2, 5]
    assert batch.segments(0, 6).tolist() == [[0, 3, 3, 10], [3, 2, 1, 0], [5, 1, 2, 40]]
    assert batch.segments(1, 4).tolist() == [[0, 2, 3, 11], [2, 1, 1, 0]]


def test_chunks_that_go_on_where_another_ends_are_one_segment() -> None:
    batch = TokenBatch.of_chunks([(0, 0, [1, 2], 0), (0, 2, [3], 1), (0, 4, [5], 1)], 3)
    assert batch.segments(0, 4).tolist() == [[0, 3, 0, 0], [3, 1, 0, 4]]


@given(chunks=chunk_lists(), data=st.data())
def test_every_token_keeps_its_chunk_and_place(chunks: list[Chunk], data: st.DataObject) -> None:
    prompts = data.draw(st.integers(0, len(chunks)))
    batch = TokenBatch.of_chunks(chunks, prompts)
    expected = [
        (token, position + place, sequence, place >= len(tokens) - outputs)
        for sequence, position, tokens, outputs in chunks
        for place, token in enumerate(tokens)
    ]
    has_output = np.isin(np.arange(len(batch.tokens)), batch.outputs)
    columns = (batch.tokens, batch.positions, batch.sequences, has_output)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert batch.prompt_tokens == sum(len(chunk[2]) for chunk in chunks[:prompts])
    assert {column.dtype for column in (*columns[:3], batch.outputs)} == {np.dtype(np.int64)}


@given(chunks=chunk_lists(), data=st.data())
def test_segments_cover_their_tokens_and_none_can_be_joined(chunks: list[Chunk], data: st.DataObject) -> None:
    batch = TokenBatch.of_chunks(chunks, len(chunks))
    first = data.draw(st.integers(0, len(batch.tokens) - 1))
    last = data.draw(st.integers(first + 1, len(batch.tokens)))
    segments = batch.segments(first, last).tolist()
    covered = [(sequence, position + place) for _, rows, sequence, position in segments for place in range(rows)]
    assert covered == list(zip(batch.sequences[first:last].tolist(), batch.positions[first:last].tolist(), strict=True))
    assert [row for row, *_ in segments] == np.cumsum([0, *(rows for _, rows, _, _ in segments)])[:-1].tolist()
    for (_, rows, sequence, position), (_, _, next_sequence, next_position) in pairwise(segments):
        assert (sequence, position + rows) != (next_sequence, next_position)

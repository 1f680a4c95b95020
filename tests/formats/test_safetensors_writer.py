"""Safetensors shards: distribution of tensors, and reading them with the safetensors library."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tritgguf.formats.safetensors_writer import half_bytes, index, plan_shards, write_shard

SHAPES = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=30)


@given(SHAPES, st.integers(1, 5000))
def test_plan(shapes: list[tuple[int, ...]], most: int) -> None:
    named = {f"tensor.{number}": shape for number, shape in enumerate(shapes)}
    shards = plan_shards(named, most)
    assert [name for shard in shards for name in shard.shapes] == list(named)
    for shard in shards:
        assert shard.n_bytes <= most or len(shard.shapes) == 1
    for shard, following in itertools.pairwise(shards):
        assert shard.n_bytes + half_bytes(next(iter(following.shapes.values()))) > most
    content = index(shards)
    assert content["metadata"]["total_size"] == sum(map(half_bytes, shapes))
    assert content["weight_map"] == {name: shard.file_name for shard in shards for name in shard.shapes}
    assert len({shard.file_name for shard in shards}) == len(shards)


def test_names() -> None:
    assert [shard.file_name for shard in plan_shards({"a": (4,), "b": (4,)}, 16)] == ["model.safetensors"]
    names = [shard.file_name for shard in plan_shards({"a": (4,), "b": (4,)}, 15)]
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@given(SHAPES)
def test_the_library_reads_it(tmp_path: Path, shapes: list[tuple[int, ...]]) -> None:
    generator = np.random.default_rng(0)
    weights = {f"w.{n}": generator.standard_normal(shape).astype(np.float16) for n, shape in enumerate(shapes)}

    def parts(name: str) -> Iterator[np.ndarray]:
        yield from np.array_split(weights[name], 3)

    (shard,) = plan_shards({name: array.shape for name, array in weights.items()}, 1 << 40)
    write_shard(tmp_path, shard, parts)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize("length", [3, 5])
def test_a_tensor_of_another_length_than_planned(tmp_path: Path, length: int) -> None:
    (shard,) = plan_shards({"w": (4,)}, 100)
    with pytest.raises(ValueError, match="than planned"):
        write_shard(tmp_path, shard, lambda _: iter([np.zeros(length, np.float16)]))

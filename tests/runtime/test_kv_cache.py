"""The key-value cache: what it keeps, in which type, and how it grows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tritgguf.cli import app
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.kv_cache import CACHE_TYPES, KeyValueCache
from tritgguf.runtime.model import Model

Files = Callable[..., GgufFile]
TOKENS = np.random.default_rng(0).integers(0, 448, 150).tolist()


def largest_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of a logit over the largest logit."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def test_it_grows_and_keeps_what_it_holds(tiny_trit_file: Files) -> None:
    cache = KeyValueCache(ModelConfig.from_file(tiny_trit_file()), 1000, 2)
    assert cache.arrays.cosines.shape[1] == 256
    generator, sizes = np.random.default_rng(0), [300, 513, 600, 1000]
    for tokens in sizes:
        keys, values = cache.arrays.keys, cache.arrays.values
        keys[:] = generator.integers(1, 1 << 15, keys.shape)
        values[:] = generator.integers(1, 1 << 15, values.shape)
        cache.reserve(tokens)
        assert tokens <= cache.arrays.cosines.shape[1] <= 1024
        np.testing.assert_array_equal(cache.arrays.keys[:, :, : keys.shape[2]], keys)
        np.testing.assert_array_equal(cache.arrays.values[:, :, :, : values.shape[3]], values)
        assert not cache.arrays.keys[:, :, keys.shape[2] :].any()
    before = cache.arrays
    cache.reserve(999)
    assert cache.arrays is before


def test_a_model_goes_on_when_its_cache_has_grown(tiny_trit_file: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Model(tiny_trit_file(), prefill_bits=16, cache_type="f32").forward(TOKENS, all_logits=True)
    monkeypatch.setattr("tritgguf.runtime.kv_cache._FIRST_CAPACITY", 1)
    model = Model(tiny_trit_file(), context=len(TOKENS), prefill_bits=16, cache_type="f32")
    assert model._cache.arrays.cosines.shape[1] == 32
    for piece in (slice(0, 30), slice(30, 33), slice(33, 34), slice(34, 100), slice(100, 150)):
        assert largest_difference(model.forward(TOKENS[piece], all_logits=True), expected[piece]) < 1e-4
    assert model._cache.arrays.cosines.shape[1] == 160


@pytest.mark.parametrize(("cache_type", "bound"), [("f32", 1e-4), ("f16", 1e-3)])
def test_types(tiny_trit_file: Files, cache_type: str, bound: float) -> None:
    """The F16 cache stays within what is promised of the logits; it is half as large, and really another one."""
    file = tiny_trit_file("qwen2")
    expected = Model(file, exact=True).forward(TOKENS, all_logits=True)
    model = Model(file, prefill_bits=16, cache_type=cache_type)
    model.forward(TOKENS[:-20])
    decoded = np.array([model.forward([token]).copy() for token in TOKENS[-20:]])
    assert largest_difference(decoded, expected[-20:]) < bound
    assert model._cache.arrays.keys.itemsize == CACHE_TYPES[cache_type].itemsize == (2 if cache_type == "f16" else 4)


def test_the_type_that_is_chosen_by_itself(tiny_trit_file: Files) -> None:
    for options, expected in (
        ({}, np.uint16),
        ({"exact": True}, np.float32),
        ({"exact": True, "cache_type": "f16"}, np.uint16),
        ({"cache_type": "f32"}, np.float32),
    ):
        arrays = Model(tiny_trit_file(), **options)._cache.arrays
        assert arrays.keys.dtype == arrays.values.dtype == expected


def test_an_unknown_type(tiny_trit_file: Files, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_trit_file()
    with pytest.raises(TritGgufError, match="a cache cannot hold q8_0; choose from f16, f32"):
        Model(file, cache_type="q8_0")
    for command in (["run", str(file.path), "-p", "a"], ["bench", str(file.path), "-p", "0", "-n", "1"]):
        assert app.main([*command, "--cache-type", "q8_0"]) == 1
        out, err = capsys.readouterr()
        assert (out, err) == ("", "error: a cache cannot hold q8_0; choose from f16, f32\n")


def test_run_and_bench_take_a_type(tiny_trit_file: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    allocate = KeyValueCache._allocate

    def note_and_allocate(self: KeyValueCache, capacity: int) -> object:
        seen.append(self._dtype)
        return allocate(self, capacity)

    monkeypatch.setattr(KeyValueCache, "_allocate", note_and_allocate)
    monkeypatch.setattr("tritgguf.diagnostics.bench.read_bandwidth", lambda crew, repetitions: 1.0)
    path = str(tiny_trit_file().path)
    for command in (["run", path, "--raw", "-p", "a", "-n", "1"], ["bench", path, "-p", "2", "-n", "1", "-r", "1"]):
        seen.clear()
        assert app.main([*command, "--cache-type", "f32", "-t", "1"]) == 0
        assert seen
        if command[0] == "run":
            assert set(seen) == {CACHE_TYPES["f32"]}
        else:
            assert CACHE_TYPES["f32"] in seen

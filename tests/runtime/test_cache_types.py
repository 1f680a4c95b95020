"""The types of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inner_kernels import as_kernel
from paged_layers import NO_STATES
from pool_config import pool_config
from sequences import open_sequence

from cpu_kernels.compilation.kernel import Kernel
from cpu_kernels.transformer.kv_pages import PAGE, KeyValues, store_head
from tritgguf.cli import app
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime.kv_pool import CACHE_TYPES, KVPool

Files = Callable[..., GgufFile]
TOKENS = np.random.default_rng(0).integers(0, 448, 150).tolist()


def largest_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of a logit over the largest logit."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(("cache_type", "bound"), [("f32", 1e-4), ("f16", 1e-3), ("q8_0", 2e-2)])
def test_types(tiny_trit_file: Files, cache_type: str, bound: float) -> None:
    """The F16 cache stays within what is promised of the logits; those that are smaller are really other ones."""
    file = tiny_trit_file("qwen2")
    expected = open_sequence(file, exact=True).forward(TOKENS, all_logits=True)
    model = open_sequence(file, prefill_bits=16, cache_type=cache_type)
    model.forward(TOKENS[:-20])
    decoded = np.array([model.forward([token]).copy() for token in TOKENS[-20:]])
    assert largest_difference(decoded, expected[-20:]) < bound
    assert (
        model.pool.element.itemsize == CACHE_TYPES[cache_type].itemsize == {"f32": 4, "f16": 2, "q8_0": 1}[cache_type]
    )


def test_the_kernels_of_a_type_are_made_ready_before_the_first_token(
    tiny_trit_file: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = open_sequence(tiny_trit_file("qwen2"), context=32, cache_type="q8_0")
    needed, find = set[tuple[str, Any]](), Kernel._version

    def note(kernel: Kernel, types: tuple[Any, ...]) -> Any:
        if "int8" in str(types):
            needed.add((kernel.py_func.__name__, types))
        return find(kernel, types)

    monkeypatch.setattr(Kernel, "_version", note)
    sequence.model.compile(lambda: None, cache_type="q8_0", batches=False)
    ready = needed.copy()
    needed.clear()
    sequence.forward(TOKENS[:9])
    sequence.forward(TOKENS[9:10])
    assert {name for name, _ in needed} >= {"attend", "decode"}
    assert needed <= ready


def as_floats(pool: KVPool, page: np.ndarray) -> np.ndarray:
    """Return the numbers of an int8 page, float32, in their places."""
    numbers = 2 * pool.layers * pool.kv_heads * PAGE * pool.padded_dim
    scales = page[numbers:].view(np.float16).astype(np.float32)
    keys = page[: numbers // 2].reshape(-1, 32, 32) * scales[: numbers // 64].reshape(-1, 1, 32)
    values = page[numbers // 2 : numbers].reshape(-1, 32) * scales[numbers // 64 :].reshape(-1, 1)
    return np.concatenate([keys.reshape(-1), values.reshape(-1)])


def test_q8_0_is_what_its_numbers_say(tiny_trit_file: Files) -> None:
    """Attention reads the same from int8 and scales as from the float32 that they stand for."""
    file, tokens = tiny_trit_file("qwen2"), np.random.default_rng(1).integers(0, 448, 400).tolist()
    int8, floats = (open_sequence(file, context=512, prefill_bits=16, cache_type=kind) for kind in ("q8_0", "f32"))
    unquantized = open_sequence(file, context=512, prefill_bits=16, cache_type="f32")
    for sequence in (int8, floats, unquantized):
        sequence.forward(tokens)
    for number, page in int8.pool._storage.items():
        found, original = as_floats(int8.pool, page), unquantized.pool._storage[number]
        floats.pool._storage[number][:] = found
        steps = original.reshape(2, -1)[1].reshape(-1, 32)  # of values: 32 numbers have a scale
        bound = np.abs(steps).max(axis=1, keepdims=True) / 127 * 0.7 + 0.05 * np.abs(original).max()
        assert (np.abs(found.reshape(2, -1)[1].reshape(-1, 32) - steps) <= bound).all()
    ours, same, other = (sequence.forward([7]).copy() for sequence in (int8, floats, unquantized))
    assert largest_difference(ours, same) < 0.25 * largest_difference(ours, other)
    assert len(int8.pool._storage) == 2
    assert page.nbytes * 32 == original.nbytes // 4 * 34


def test_damage_stays_visible_in_q8_0() -> None:
    """No number, and what int8 could not hold: infinity becomes the largest number, NaN stays."""
    pool = KVPool(pool_config(64), pages=1, sequences=1, context=256, cache_type="q8_0")
    pool.reserve(pool.allocate(), 1)
    key = np.ones(64, np.float32)
    key[3], key[40] = np.nan, np.inf
    turns = np.ones((1, 1, 32), np.float32)
    kv = KeyValues(pool.table, pool.element, 1, 1, 64, turns, turns, np.zeros(1, np.int64), 0, 0, *NO_STATES)
    as_kernel(store_head)(kv, 0, 0, 0, 0, key, np.zeros(64, np.float32))
    keys = as_floats(pool, pool._storage[0])[: PAGE * 64].reshape(8, 64, 32)[0, :, 0]
    assert np.isnan(keys[:32]).all()
    assert keys[40] > 1e6 and np.isfinite(keys[32:]).all()


def test_the_type_that_is_chosen_by_itself(tiny_trit_file: Files) -> None:
    for options, expected in (
        ({}, np.uint16),
        ({"exact": True}, np.float32),
        ({"exact": True, "cache_type": "f16"}, np.uint16),
        ({"cache_type": "f32"}, np.float32),
    ):
        assert open_sequence(tiny_trit_file(), **options).pool.element.dtype == expected


def test_an_unknown_type(tiny_trit_file: Files, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_trit_file()
    with pytest.raises(TritGgufError, match="a cache cannot hold q4_0; choose from f16, f32, q8_0"):
        open_sequence(file, cache_type="q4_0")
    for command in (["run", str(file.path), "-p", "a"], ["bench", str(file.path), "-p", "0", "-n", "1"]):
        assert app.main([*command, "--cache-type", "q4_0"]) == 1
        out, err = capsys.readouterr()
        assert (out, err) == ("", "error: a cache cannot hold q4_0; choose from f16, f32, q8_0\n")


def test_run_and_bench_take_a_type(tiny_trit_file: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    take = KVPool._take_page

    def note_and_take(self: KVPool) -> int:
        seen.append(self.element.dtype)
        return take(self)

    monkeypatch.setattr(KVPool, "_take_page", note_and_take)
    monkeypatch.setattr("tritgguf.diagnostics.bench.read_bandwidth", lambda thread_pool, repetitions: 1.0)
    path = str(tiny_trit_file().path)
    for command in (["run", path, "--raw", "-p", "a", "-n", "1"], ["bench", path, "-p", "2", "-n", "1", "-r", "1"]):
        seen.clear()
        assert app.main([*command, "--cache-type", "f32", "-t", "1"]) == 0
        assert seen
        if command[0] == "run":
            assert set(seen) == {CACHE_TYPES["f32"]}
        else:
            assert CACHE_TYPES["f32"] in seen

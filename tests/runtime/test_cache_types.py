"""The types of keys and values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sequences import open_sequence

from tritgguf.cli import app
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime.kv_pool import CACHE_TYPES, KVPool

Files = Callable[..., GgufFile]
TOKENS = np.random.default_rng(0).integers(0, 448, 150).tolist()


def largest_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of a logit over the largest logit."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("cache_type", "bound"), [("f32", 1e-4), ("f16", 1e-3)])
def test_types(tiny_trit_file: Files, cache_type: str, bound: float) -> None:
    """The F16 cache stays within what is promised of the logits; it is half as large, and really another one."""
    file = tiny_trit_file("qwen2")
    expected = open_sequence(file, exact=True).forward(TOKENS, all_logits=True)
    model = open_sequence(file, prefill_bits=16, cache_type=cache_type)
    model.forward(TOKENS[:-20])
    decoded = np.array([model.forward([token]).copy() for token in TOKENS[-20:]])
    assert largest_difference(decoded, expected[-20:]) < bound
    assert model.pool.element.itemsize == CACHE_TYPES[cache_type].itemsize == (2 if cache_type == "f16" else 4)


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
    with pytest.raises(TritGgufError, match="a cache cannot hold q8_0; choose from f16, f32"):
        open_sequence(file, cache_type="q8_0")
    for command in (["run", str(file.path), "-p", "a"], ["bench", str(file.path), "-p", "0", "-n", "1"]):
        assert app.main([*command, "--cache-type", "q8_0"]) == 1
        out, err = capsys.readouterr()
        assert (out, err) == ("", "error: a cache cannot hold q8_0; choose from f16, f32\n")


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

"""Texts side by side; `test_families` compares them with the same texts alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime import lockstep
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.kv_cache import cache_bytes
from tritgguf.runtime.lockstep import Lockstep

LENGTH, TEXTS = 40, 5
TOKENS = np.random.default_rng(0).integers(0, 400, (LENGTH, TEXTS))


def written(file: GgufFile, tokens: np.ndarray, threads: int = 2) -> np.ndarray:
    """Return all logits: [places, texts, vocabulary]."""
    model = Lockstep(file, context=len(tokens), threads=threads)
    model.begin(tokens.shape[1])
    return np.stack([model.forward(row).copy() for row in tokens])


def test_a_text_does_not_depend_on_the_others(tiny_trit_file: Callable[..., GgufFile]) -> None:
    file = tiny_trit_file("llama", 2)
    together = written(file, TOKENS)
    np.testing.assert_array_equal(together[:, 1:3], written(file, TOKENS[:, 1:3], threads=3))
    np.testing.assert_array_equal(together[:, 4:], written(file, TOKENS[:, 4:]))


def test_new_texts_know_nothing_of_the_old_ones(tiny_trit_file: Callable[..., GgufFile]) -> None:
    file = tiny_trit_file("llama", 2)
    model = Lockstep(file, context=LENGTH)
    model.begin(TEXTS)
    first = [model.forward(row).copy() for row in TOKENS]
    model.begin(2)
    again = [model.forward(row).copy() for row in TOKENS[:, :2]]
    np.testing.assert_array_equal(np.stack(first)[:, :2], np.stack(again))


def test_what_is_refused(tiny_trit_file: Callable[..., GgufFile]) -> None:
    model = Lockstep(tiny_trit_file("llama", 2), context=2)
    model.begin(2)
    for bad in (-1, model.forward(np.zeros(2, np.int64)).shape[1]):
        with pytest.raises(TritGgufError, match="tokens must be from 0 to"):
            model.forward(np.array([0, bad]))
    model.forward(np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="as long as they may be"):
        model.forward(np.zeros(2, np.int64))


def test_caches_are_bounded(tiny_trit_file: Callable[..., GgufFile], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_trit_file("llama", 2)
    assert Lockstep(file, context=64).most_texts == 64
    one = cache_bytes(ModelConfig.from_file(file), 64)
    for room, texts in ((3 * one, 3), (one - 1, 1)):
        monkeypatch.setattr(lockstep, "_CACHE_BYTES", room)
        assert Lockstep(file, context=64).most_texts == texts

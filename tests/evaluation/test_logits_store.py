"""Logits on disk: what is found, what is kept, and the bound."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_model

from tritgguf.errors import BadRequestError
from tritgguf.evaluation.logits_store import BOUND_VARIABLE, LogitsStore, logits_key, user_store
from tritgguf.sources.open import open_source

WINDOWS = [[1, 2, 3], [4, 5]]


def logits(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, 100)).astype(np.float32)


def keep(store: LogitsStore, key: str, tokens: int = 5, seed: int = 0) -> np.ndarray:
    whole = logits(tokens, seed)
    with store.keeping(key, tokens) as add:
        add(whole[:3])
        add(whole[3:])
    return whole


def names(store: LogitsStore) -> list[str]:
    return sorted(path.name.split(".")[0] for path in store.folder.iterdir()) if store.folder.exists() else []


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    store = LogitsStore(tmp_path / "a" / "b", 1 << 20)
    assert store.find("key", 5) is None
    whole = keep(store, "key")
    found = store.find("key", 5)
    assert found is not None
    np.testing.assert_array_equal(found, whole)
    assert store.find("key", 6) is None
    assert store.find("other", 5) is None


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    store = LogitsStore(tmp_path, 5000)  # room for two: each takes 2,128 bytes
    for age, key in enumerate(("a", "b")):
        keep(store, key)
        os.utime(tmp_path / f"{key}.logits.npy", (1000 + age, 1000 + age))
    assert store.find("a", 5) is not None  # and so it is newer than b
    keep(store, "c")
    assert names(store) == ["a", "c"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000


def test_more_than_the_bound_is_not_kept_and_removes_nothing(tmp_path: Path) -> None:
    store = LogitsStore(tmp_path, 5000)
    keep(store, "a")
    keep(store, "large", tokens=20)
    assert names(store) == ["a"]


def test_an_interruption_keeps_nothing(tmp_path: Path) -> None:
    store = LogitsStore(tmp_path, 1 << 20)
    with pytest.raises(KeyboardInterrupt), store.keeping("key", 5) as add:
        add(logits(3))
        raise KeyboardInterrupt
    assert names(store) == []


@pytest.mark.parametrize("fault", ["full", "no folder"])
def test_a_disk_that_takes_nothing_only_means_that_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    store = LogitsStore(tmp_path / "store", 1 << 20)
    if fault == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 10))
    else:
        (tmp_path / "store").write_text("a file")
    keep(store, "key")
    assert store.find("key", 5) is None


@pytest.mark.parametrize("content", [b"", b"damaged", b"\x93NUMPY\x01\x00"])
def test_a_damaged_file_is_not_found(tmp_path: Path, content: bytes) -> None:
    store = LogitsStore(tmp_path, 1 << 20)
    keep(store, "key")
    (tmp_path / "key.logits.npy").write_bytes(content)
    assert store.find("key", 5) is None
    keep(store, "key")
    assert store.find("key", 5) is not None


def test_a_truncated_file_is_not_found(tmp_path: Path) -> None:
    store = LogitsStore(tmp_path, 1 << 20)
    keep(store, "key")
    os.truncate(tmp_path / "key.logits.npy", 1000)
    assert store.find("key", 5) is None


def test_the_key_depends_on_source_and_tokens(tmp_path: Path) -> None:
    source = open_source(write_tiny_model(tmp_path / "model"))
    key = logits_key(source, WINDOWS)
    assert logits_key(open_source(tmp_path / "model"), WINDOWS) == key
    assert logits_key(source, [[1, 2, 3], [4, 6]]) != key
    assert logits_key(source, [[1, 2], [3, 4, 5]]) != key
    weights = next((tmp_path / "model").glob("*.safetensors"))
    os.utime(weights, (1, 1))
    assert logits_key(source, WINDOWS) != key
    assert logits_key(open_source(write_tiny_model(tmp_path / "other")), WINDOWS) != key


def test_the_user_s_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tritgguf.evaluation.logits_store.user_cache_folder", lambda: tmp_path)
    monkeypatch.setenv(BOUND_VARIABLE, "0")
    assert user_store() is None
    monkeypatch.setenv(BOUND_VARIABLE, "2GB")
    store = user_store()
    assert store is not None
    assert (store.folder, store.bound) == (tmp_path / "logits", 2_000_000_000)
    monkeypatch.setenv(BOUND_VARIABLE, "much")
    with pytest.raises(BadRequestError, match="TRITGGUF_LOGITS is much, which is no size"):
        user_store()

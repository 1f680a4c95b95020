"""Good GGUF files that are no models which can be run: each is refused in one line that names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValue, GGUFValueType
from sequences import open_sequence

from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_header import F16, F32
from tritgguf.formats.gguf_writer import PlannedTensor, StreamingWriter

Files = Callable[..., GgufFile]


def rewritten(
    file: GgufFile,
    path: Path,
    *,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    metadata: Mapping[str, GGUFValue | None] | None = None,
) -> GgufFile:
    """Write a file again with some tensors and keys changed, or left out where None; arrays as F32 or F16."""
    changed = dict(tensors or {})
    plan, data = [], []
    for name, info in file.tensors.items():
        array = changed.pop(name, file.raw(name))
        if array is None:
            continue
        if array.dtype == np.uint8:
            plan.append(PlannedTensor(name, info.shape, info.type_id, info.n_bytes))
        else:
            plan.append(PlannedTensor(name, array.shape, F32 if array.dtype == np.float32 else F16, array.nbytes))
        data.append(array)
    assert not changed
    keys = {key: file.value(key) for key in file.metadata} | dict(metadata or {})
    kept = {key: value for key, value in keys.items() if value is not None}
    with StreamingWriter(path, kept, plan, overwrite=True) as writer:
        for planned, array in zip(plan, data, strict=True):
            writer.begin(planned)
            writer.write(array)
    return GgufFile(path)


def refused(file: GgufFile, message: str) -> None:
    """Assert that a file is refused in one line that names it."""
    with pytest.raises(TritGgufError, match=message) as caught:
        open_sequence(file, context=8)
    assert str(file.path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_rewritten_file_runs(tiny_trit_file: Files, tmp_path: Path) -> None:
    file = rewritten(tiny_trit_file(), tmp_path / "same.gguf")
    np.testing.assert_array_equal(
        open_sequence(file, context=8).forward([1]), open_sequence(tiny_trit_file(), context=8).forward([1])
    )


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight"]
)
def test_missing_tensor(tiny_trit_file: Files, tmp_path: Path, name: str) -> None:
    refused(rewritten(tiny_trit_file(), tmp_path / "bad.gguf", tensors={name: None}), name.replace(".", r"\."))


@pytest.mark.parametrize("name", ["blk.1.attn_k.bias", "blk.0.attn_v.bias"])
def test_missing_bias(tiny_trit_file: Files, tmp_path: Path, name: str) -> None:
    refused(rewritten(tiny_trit_file("qwen2"), tmp_path / "bad.gguf", tensors={name: None}), "bias")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_norm.weight", (64,)),
        ("output_norm.weight", (128, 1)),
        ("blk.1.ffn_up.weight", (192, 64)),
        ("blk.1.attn_output.weight", (128,)),
        ("output.weight", (447, 128)),
        ("token_embd.weight", (448, 64)),
        ("token_embd.weight", (448,)),
    ],
)
def test_wrong_shape(tiny_trit_file: Files, tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    changed = np.zeros(shape, np.float32 if "norm" in name else np.float16)
    refused(rewritten(tiny_trit_file(), tmp_path / "bad.gguf", tensors={name: changed}), "has the shape|embedding")


def test_wrong_type(tiny_trit_file: Files, tmp_path: Path) -> None:
    for name, array, message in (
        ("blk.0.attn_norm.weight", np.ones(128, np.float16), "is F16"),
        ("blk.0.attn_q.weight", np.zeros((128, 128), np.float32), "only trit files are run"),
        ("token_embd.weight", np.zeros((448, 128), np.float32), "only trit files are run"),
        ("output.weight", np.zeros((448, 128), np.float32), "only trit files are run"),
    ):
        refused(rewritten(tiny_trit_file(), tmp_path / "bad.gguf", tensors={name: array}), message)


def test_missing_codebook(tiny_trit_file: Files, tmp_path: Path) -> None:
    file = rewritten(tiny_trit_file(), tmp_path / "bad.gguf", metadata={"trit.codebook.blk.1.attn_q.weight": None})
    refused(file, r"tensor blk\.1\.attn_q\.weight has no codebook")


def test_unknown_version_of_the_format(tiny_trit_file: Files, tmp_path: Path) -> None:
    for version in (GGUFValue(2, GGUFValueType.UINT32), None):
        with pytest.raises(TritGgufError, match=r"bad\.gguf: version (2|None) of the trit format"):
            rewritten(tiny_trit_file(), tmp_path / "bad.gguf", metadata={"trit.version": version})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.architecture", "mamba"),
        ("llama.block_count", 0),
        ("llama.block_count", 3),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 5),
        ("llama.attention.head_count_kv", 3),
        ("llama.embedding_length", 64),
        ("llama.feed_forward_length", 1),
        ("llama.context_length", 0),
        ("llama.attention.layer_norm_rms_epsilon", 0.0),
        ("llama.attention.layer_norm_rms_epsilon", 1e-60),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.rope.freq_base", -1.0),
        ("llama.rope.freq_base", "10000"),
        ("llama.rope.dimension_count", 16),
    ],
)
def test_impossible_keys(tiny_trit_file: Files, tmp_path: Path, key: str, value: Any) -> None:
    kind = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT64}[type(value)]
    refused(rewritten(tiny_trit_file(), tmp_path / "bad.gguf", metadata={key: GGUFValue(value, kind)}), "bad.gguf: ")


@pytest.mark.parametrize("key", ["llama.block_count", "llama.context_length", "llama.embedding_length"])
def test_missing_keys(tiny_trit_file: Files, tmp_path: Path, key: str) -> None:
    refused(rewritten(tiny_trit_file(), tmp_path / "bad.gguf", metadata={key: None}), key.replace(".", r"\."))


def test_missing_keys_with_defaults(tiny_trit_file: Files, tmp_path: Path) -> None:
    # llama.cpp's defaults: 10,000 and, for the key-value heads, no sharing.
    file = tiny_trit_file("llama-no-gqa")
    keys = {"llama.rope.freq_base": None, "llama.attention.head_count_kv": None}
    changed = rewritten(file, tmp_path / "default.gguf", metadata=keys)
    np.testing.assert_array_equal(
        open_sequence(changed, context=8).forward([1]), open_sequence(file, context=8).forward([1])
    )


def test_rope_scaling_that_cannot_be_run(tiny_trit_file: Files, tmp_path: Path) -> None:
    scaling = {"llama.rope.scaling.type": GGUFValue("longrope", GGUFValueType.STRING)}
    file = rewritten(tiny_trit_file("linear-rope"), tmp_path / "bad.gguf", metadata=scaling)
    refused(file, "rope scaling longrope cannot be run")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_impossible_rope_factors(tiny_trit_file: Files, tmp_path: Path, value: float) -> None:
    factors = np.ones(16, np.float32)
    factors[3] = value
    file = rewritten(tiny_trit_file("llama3-rope"), tmp_path / "bad.gguf", tensors={"rope_freqs.weight": factors})
    refused(file, r"rope_freqs\.weight")


def test_a_stock_file_is_no_trit_model(smollm2_gguf: Path) -> None:
    refused(GgufFile(smollm2_gguf), "tritgguf convert")

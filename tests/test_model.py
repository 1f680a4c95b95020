"""The forward pass against a float64 transformer, its cache, and files that it must refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from gguf import GGUFValue, GGUFValueType
from tiny_models import write_tiny_model

from tritgguf.convert import convert
from tritgguf.errors import TritGgufError
from tritgguf.gguf_file import F16, F32, GgufFile
from tritgguf.gguf_writer import PlannedTensor, StreamingWriter
from tritgguf.model import Model

TOKENS = [5, 401, 17, 17, 300, 0, 447, 62, 128, 33, 254]
Files = Callable[..., GgufFile]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Return a function from a variant and a depth to an open trit file; each is made once."""
    folder, files = tmp_path_factory.mktemp("tiny"), dict[tuple[str, int], GgufFile]()

    def open_file(variant: str = "llama", depth: int = 2) -> GgufFile:
        if (variant, depth) not in files:
            output = folder / f"{variant}-{depth}.gguf"
            source = folder / variant
            convert(source if source.exists() else write_tiny_model(source, variant), output, depth=depth)
            files[variant, depth] = GgufFile(output)
        return files[variant, depth]

    return open_file


def expected_logits(file: GgufFile, tokens: list[int]) -> np.ndarray:
    tensors = {name: file.read_float32(name) for name in file.tensors}
    return naive.transformer_logits(file.metadata, tensors, tokens)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Assert that logits differ by less than a ten-thousandth of the largest, a tenth of what is promised."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


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


# -- logits


@pytest.mark.parametrize(
    "variant",
    [
        "llama",
        "llama-tied",
        "llama-no-gqa",
        "llama-biases",
        "llama3-rope",
        "linear-rope",
        "mistral",
        "qwen2",
        "qwen2-tied",
        "unaligned",
    ],
)
def test_logits(tiny: Files, variant: str) -> None:
    file = tiny(variant)
    expected = expected_logits(file, TOKENS)
    model = Model(file, context=32)
    assert_close(model.forward(TOKENS, all_logits=True), expected)
    model.truncate(0)
    for token, row in zip(TOKENS, expected, strict=True):
        assert_close(model.forward([token]), row)
    assert model.position == len(TOKENS)


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_logits_at_other_depths(tiny: Files, depth: int) -> None:
    file = tiny("llama", depth)
    expected = expected_logits(file, TOKENS)
    model = Model(file, context=32)
    assert_close(model.forward(TOKENS[:-1], all_logits=True), expected[:-1])
    assert_close(model.forward(TOKENS[-1:]), expected[-1])


def test_exact_logits(tiny: Files) -> None:
    expected = expected_logits(tiny("llama", 1), TOKENS)
    model = Model(tiny("llama", 1), context=32, exact=True)
    tolerance = 3e-6 * np.abs(expected).max()
    np.testing.assert_allclose(model.forward(TOKENS[:-1], all_logits=True), expected[:-1], rtol=0, atol=tolerance)
    np.testing.assert_allclose(model.forward(TOKENS[-1:]), expected[-1], rtol=0, atol=tolerance)


def test_logits_in_every_instruction_set(tiny: Files, variant: str) -> None:
    file = tiny()
    expected = expected_logits(file, TOKENS)
    model = Model(file, context=32)
    assert_close(model.forward(TOKENS[:-1], all_logits=True), expected[:-1])
    assert_close(model.forward(TOKENS[-1:]), expected[-1])


def test_rotation_matters(tiny: Files) -> None:
    """The variants of the rotation are different models, so that the tests above can tell them apart."""
    file = tiny("llama3-rope")
    tensors = {name: file.read_float32(name) for name in file.tensors}
    expected = naive.transformer_logits(file.metadata, tensors, TOKENS)
    del tensors["rope_freqs.weight"]
    unscaled = naive.transformer_logits(file.metadata, tensors, TOKENS)
    assert np.abs(expected - unscaled).max() > 0.01 * np.abs(expected).max()
    file = tiny("linear-rope")
    without = {key: value for key, value in file.metadata.items() if "scaling" not in key}
    tensors = {name: file.read_float32(name) for name in file.tensors}
    expected, unscaled = (naive.transformer_logits(keys, tensors, TOKENS) for keys in (file.metadata, without))
    assert np.abs(expected - unscaled).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_do_not_change_a_bit(tiny: Files, threads: int) -> None:
    one, many = Model(tiny(), context=32, threads=1), Model(tiny(), context=32, threads=threads)
    np.testing.assert_array_equal(many.forward(TOKENS, all_logits=True), one.forward(TOKENS, all_logits=True))
    for token in TOKENS:
        np.testing.assert_array_equal(many.forward([token]), one.forward([token]))


def test_a_prompt_in_pieces(tiny: Files) -> None:
    model = Model(tiny("qwen2"), context=32)
    whole = model.forward(TOKENS, all_logits=True)
    for pieces in ((11,), (1, 10), (10, 1), (4, 7), (1, 1, 2, 7), (9, 1, 1)):
        model.truncate(0)
        start = 0
        for piece in pieces:
            part = model.forward(TOKENS[start : start + piece], all_logits=True)
            assert part.shape == (piece, 448)
            assert_close(part, whole[start : start + piece])
            start += piece
        assert model.position == 11


def test_only_the_last_logits(tiny: Files) -> None:
    model = Model(tiny(), context=32)
    whole = model.forward(TOKENS, all_logits=True)
    model.truncate(0)
    last = model.forward(TOKENS)
    assert last.shape == (448,)
    assert last.dtype == np.float32
    assert_close(last, whole[-1])


@pytest.mark.parametrize("all_logits", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 3, 5, 11])
def test_long_prompts_run_in_batches(
    tiny: Files, monkeypatch: pytest.MonkeyPatch, batch_tokens: int, all_logits: bool
) -> None:
    expected = Model(tiny(), context=32).forward(TOKENS, all_logits=True)
    monkeypatch.setattr("tritgguf.model.BATCH_TOKENS", batch_tokens)
    model = Model(tiny(), context=32)
    logits = model.forward(TOKENS, all_logits=all_logits)
    assert_close(logits, expected if all_logits else expected[-1])
    assert model.position == 11


# -- the cache


def test_truncate_and_go_on(tiny: Files) -> None:
    model = Model(tiny(), context=32)
    expected = model.forward(TOKENS, all_logits=True)
    model.truncate(4)
    assert model.position == 4
    model.forward([1, 2, 3])
    model.truncate(4)
    assert_close(model.forward(TOKENS[4:], all_logits=True), expected[4:])
    for position in (-1, 12):
        with pytest.raises(ValueError, match="within what it holds"):
            model.truncate(position)
    assert model.position == 11


def test_the_cache_grows_with_its_contents(tiny: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expected_logits(tiny(), TOKENS)
    monkeypatch.setattr("tritgguf.cache._FIRST_CAPACITY", 2)
    model = Model(tiny(), context=11)
    for piece in (slice(0, 1), slice(1, 3), slice(3, 10), slice(10, 11)):
        assert_close(model.forward(TOKENS[piece], all_logits=True), expected[piece])
    with pytest.raises(TritGgufError):
        model.forward([1])


def test_context(tiny: Files) -> None:
    assert Model(tiny()).context == 256
    model = Model(tiny(), context=11)
    with pytest.raises(TritGgufError, match="12 tokens do not fit into a context of 11") as caught:
        model.forward([*TOKENS, 1])
    assert "\n" not in str(caught.value)
    assert model.position == 0
    logits = model.forward(TOKENS).copy()
    with pytest.raises(TritGgufError, match="12 tokens do not fit"):
        model.forward([1])
    assert model.position == 11
    model.truncate(10)
    assert_close(model.forward(TOKENS[-1:]), logits)


@pytest.mark.parametrize("tokens", [[], [-1], [448], [1, 2, 448], [2**40]])
def test_tokens_that_do_not_exist(tiny: Files, tokens: list[int]) -> None:
    model = Model(tiny(), context=8)
    model.forward([1])
    with pytest.raises(TritGgufError, match="tokens must be from 0 to 447"):
        model.forward(tokens)
    assert model.position == 1


def test_two_models_of_one_file_do_not_disturb_each_other(tiny: Files) -> None:
    first, second = Model(tiny(), context=16), Model(tiny(), context=16)
    expected = expected_logits(tiny(), TOKENS)
    for token, row in zip(TOKENS, expected, strict=True):
        second.forward([(token + 1) % 448])
        assert_close(first.forward([token]), row)


def test_logits_of_single_tokens_can_be_kept(tiny: Files) -> None:
    model = Model(tiny(), context=16)
    kept = model.forward([1], all_logits=True)
    before = kept.copy()
    model.forward([2])
    np.testing.assert_array_equal(kept, before)


# -- weights


def test_weights_are_views_of_the_file(tiny: Files) -> None:
    file = tiny("qwen2")
    weights = Model(file, context=8)._weights
    matrices = {
        f"blk.{index}.{name}.weight": matrix
        for index, layer in enumerate(weights.layers)
        for name, matrix in zip(
            ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
            [matrix for projection in layer.projections for matrix in projection.matrices],
            strict=True,
        )
    }
    matrices["output.weight"] = weights.head.matrices[0]
    assert len(matrices) == 15
    for name, matrix in matrices.items():
        raw = file.raw(name)
        assert matrix.data.ctypes.data == raw.ctypes.data
        assert matrix.data.nbytes == raw.nbytes
        assert not matrix.data.flags.writeable
    for projection in [*(p for layer in weights.layers for p in layer.projections), weights.head]:
        assert projection.addresses.tolist() == [matrix.data.ctypes.data for matrix in projection.matrices]
    assert weights.embeddings.ctypes.data == file.raw("token_embd.weight").ctypes.data


def test_tied_embeddings_are_the_head(tiny: Files) -> None:
    weights = Model(tiny("llama-tied"), context=8)._weights
    assert weights.head.matrices[0].data.ctypes.data == weights.embeddings.ctypes.data


def test_config(tiny: Files) -> None:
    config = Model(tiny("qwen2"), context=8).config
    assert (config.vocab_size, config.embedding_length, config.layer_count) == (448, 128, 2)
    assert (config.context_length, config.architecture, config.interleaved_rotation) == (256, "qwen2", False)
    assert Model(tiny("mistral"), context=8).config.interleaved_rotation


# -- files that are refused


def refused(file: GgufFile, message: str) -> None:
    """Assert that a file is refused in one line that names it."""
    with pytest.raises(TritGgufError, match=message) as caught:
        Model(file, context=8)
    assert str(file.path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_rewritten_file_runs(tiny: Files, tmp_path: Path) -> None:
    file = rewritten(tiny(), tmp_path / "same.gguf")
    np.testing.assert_array_equal(Model(file, context=8).forward([1]), Model(tiny(), context=8).forward([1]))


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight"]
)
def test_missing_tensor(tiny: Files, tmp_path: Path, name: str) -> None:
    refused(rewritten(tiny(), tmp_path / "bad.gguf", tensors={name: None}), name.replace(".", r"\."))


@pytest.mark.parametrize("name", ["blk.1.attn_k.bias", "blk.0.attn_v.bias"])
def test_missing_bias(tiny: Files, tmp_path: Path, name: str) -> None:
    refused(rewritten(tiny("qwen2"), tmp_path / "bad.gguf", tensors={name: None}), "bias")


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
def test_wrong_shape(tiny: Files, tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    changed = np.zeros(shape, np.float32 if "norm" in name else np.float16)
    refused(rewritten(tiny(), tmp_path / "bad.gguf", tensors={name: changed}), "has the shape|embedding")


def test_wrong_type(tiny: Files, tmp_path: Path) -> None:
    for name, array, message in (
        ("blk.0.attn_norm.weight", np.ones(128, np.float16), "is F16"),
        ("blk.0.attn_q.weight", np.zeros((128, 128), np.float32), "only trit files are run"),
        ("token_embd.weight", np.zeros((448, 128), np.float32), "is not F16"),
        ("output.weight", np.zeros((448, 128), np.float32), "only trit files are run"),
    ):
        refused(rewritten(tiny(), tmp_path / "bad.gguf", tensors={name: array}), message)


def test_missing_codebook(tiny: Files, tmp_path: Path) -> None:
    file = rewritten(tiny(), tmp_path / "bad.gguf", metadata={"trit.codebook.blk.1.attn_q.weight": None})
    refused(file, r"tensor blk\.1\.attn_q\.weight has no codebook")


def test_unknown_version_of_the_format(tiny: Files, tmp_path: Path) -> None:
    for version in (GGUFValue(2, GGUFValueType.UINT32), None):
        with pytest.raises(TritGgufError, match=r"bad\.gguf: version (2|None) of the trit format"):
            rewritten(tiny(), tmp_path / "bad.gguf", metadata={"trit.version": version})


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
def test_impossible_keys(tiny: Files, tmp_path: Path, key: str, value: Any) -> None:
    kind = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT64}[type(value)]
    refused(rewritten(tiny(), tmp_path / "bad.gguf", metadata={key: GGUFValue(value, kind)}), "bad.gguf: ")


@pytest.mark.parametrize("key", ["llama.block_count", "llama.context_length", "llama.embedding_length"])
def test_missing_keys(tiny: Files, tmp_path: Path, key: str) -> None:
    refused(rewritten(tiny(), tmp_path / "bad.gguf", metadata={key: None}), key.replace(".", r"\."))


def test_missing_keys_with_defaults(tiny: Files, tmp_path: Path) -> None:
    # llama.cpp's defaults: 10,000 and, for the key-value heads, no sharing.
    file = tiny("llama-no-gqa")
    keys = {"llama.rope.freq_base": None, "llama.attention.head_count_kv": None}
    changed = rewritten(file, tmp_path / "default.gguf", metadata=keys)
    np.testing.assert_array_equal(Model(changed, context=8).forward([1]), Model(file, context=8).forward([1]))


def test_rope_scaling_that_cannot_be_run(tiny: Files) -> None:
    refused(tiny("yarn-rope"), "rope scaling yarn cannot be run")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_impossible_rope_factors(tiny: Files, tmp_path: Path, value: float) -> None:
    factors = np.ones(16, np.float32)
    factors[3] = value
    file = rewritten(tiny("llama3-rope"), tmp_path / "bad.gguf", tensors={"rope_freqs.weight": factors})
    refused(file, r"rope_freqs\.weight")


def test_a_stock_file_is_no_trit_model(smollm2_gguf: Path) -> None:
    refused(GgufFile(smollm2_gguf), "tritgguf convert")

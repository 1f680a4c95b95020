"""The forward pass against a float64 transformer, its cache, and files that it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import numpy as np
import pytest
from sequences import open_sequence

from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime.single_sequence import SingleSequence

TOKENS = [5, 401, 17, 17, 300, 0, 447, 62, 128, 33, 254]
Files = Callable[..., GgufFile]


def expected_logits(file: GgufFile, tokens: list[int]) -> np.ndarray:
    tensors = {name: file.read_float32(name) for name in file.tensors}
    return naive.transformer_logits(file.metadata, tensors, tokens)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Assert that logits differ by less than a ten-thousandth of the largest, a tenth of what is promised."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def precise_model(file: GgufFile, **options: Any) -> SingleSequence:
    """Return a model that rounds as little as it can without `exact`."""
    return open_sequence(file, prefill_bits=16, cache_type="f32", **options)


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
def test_logits(tiny_trit_file: Files, variant: str) -> None:
    file = tiny_trit_file(variant)
    expected = expected_logits(file, TOKENS)
    model = precise_model(file, context=32)
    assert_close(model.forward(TOKENS, all_logits=True), expected)
    model.truncate(0)
    for token, row in zip(TOKENS, expected, strict=True):
        assert_close(model.forward([token]), row)
    assert model.position == len(TOKENS)


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_logits_at_other_depths(tiny_trit_file: Files, depth: int) -> None:
    file = tiny_trit_file("llama", depth)
    expected = expected_logits(file, TOKENS)
    model = precise_model(file, context=32)
    assert_close(model.forward(TOKENS[:-1], all_logits=True), expected[:-1])
    assert_close(model.forward(TOKENS[-1:]), expected[-1])


@pytest.mark.parametrize("variant", ["llama", "qwen2", "llama-biases", "unaligned"])
@pytest.mark.parametrize("options", [{}, {"prefill_bits": 16}, {"decode_bits": 8}, {"cache_type": "f32"}])
def test_logits_as_run_computes_them(tiny_trit_file: Files, variant: str, options: dict[str, Any]) -> None:
    """Eight-bit activations of a prompt and a cache of halves move logits by a hundredth at most, and do move them."""
    file = tiny_trit_file(variant)
    expected = expected_logits(file, TOKENS)
    model = open_sequence(file, context=32, **options)
    found = model.forward(TOKENS[:-1], all_logits=True), model.forward(TOKENS[-1:])
    difference = max(np.abs(found[0] - expected[:-1]).max(), np.abs(found[1] - expected[-1]).max())
    largest = np.abs(expected).max()
    bound = {"prefill_bits": 2e-3, "cache_type": 2e-2}.get(next(iter(options), ""), 2e-2)
    assert difference < bound * largest
    precise = precise_model(file, context=32)
    assert not np.array_equal(precise.forward(TOKENS[:-1], all_logits=True), found[0])


def test_generated_tokens_of_fewer_bits(tiny_trit_file: Files) -> None:
    """A generated token has 8 bits like one of a prompt, whose sums have another order; the head has 16 for both."""
    model = open_sequence(tiny_trit_file(), context=32, decode_bits=8)
    found = {}
    for generated in (True, False):
        model.truncate(0)
        found[generated] = model.forward(TOKENS[:1], generated=generated)
    assert np.abs(found[True] - found[False]).max() < 1e-4 * np.abs(found[False]).max()
    wide = open_sequence(tiny_trit_file(), context=32).forward(TOKENS[:1])
    assert np.abs(found[True] - wide).max() > 1e-4 * np.abs(wide).max()


def test_exact_logits(tiny_trit_file: Files) -> None:
    expected = expected_logits(tiny_trit_file("llama", 1), TOKENS)
    model = open_sequence(tiny_trit_file("llama", 1), context=32, exact=True)
    tolerance = 3e-6 * np.abs(expected).max()
    np.testing.assert_allclose(model.forward(TOKENS[:-1], all_logits=True), expected[:-1], rtol=0, atol=tolerance)
    np.testing.assert_allclose(model.forward(TOKENS[-1:]), expected[-1], rtol=0, atol=tolerance)


def test_logits_in_every_instruction_set(tiny_trit_file: Files, variant: str) -> None:
    file = tiny_trit_file()
    expected = expected_logits(file, TOKENS)
    model = precise_model(file, context=32)
    assert_close(model.forward(TOKENS[:-1], all_logits=True), expected[:-1])
    assert_close(model.forward(TOKENS[-1:]), expected[-1])


def test_rotation_matters(tiny_trit_file: Files) -> None:
    """The variants of the rotation are different models, so that the tests above can tell them apart."""
    file = tiny_trit_file("llama3-rope")
    tensors = {name: file.read_float32(name) for name in file.tensors}
    expected = naive.transformer_logits(file.metadata, tensors, TOKENS)
    del tensors["rope_freqs.weight"]
    unscaled = naive.transformer_logits(file.metadata, tensors, TOKENS)
    assert np.abs(expected - unscaled).max() > 0.01 * np.abs(expected).max()
    file = tiny_trit_file("linear-rope")
    without = {key: value for key, value in file.metadata.items() if "scaling" not in key}
    tensors = {name: file.read_float32(name) for name in file.tensors}
    expected, unscaled = (naive.transformer_logits(keys, tensors, TOKENS) for keys in (file.metadata, without))
    assert np.abs(expected - unscaled).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_do_not_change_a_bit(tiny_trit_file: Files, threads: int) -> None:
    one, many = (
        precise_model(tiny_trit_file(), context=32, threads=1),
        precise_model(tiny_trit_file(), context=32, threads=threads),
    )
    np.testing.assert_array_equal(many.forward(TOKENS, all_logits=True), one.forward(TOKENS, all_logits=True))
    for token in TOKENS:
        np.testing.assert_array_equal(many.forward([token]), one.forward([token]))


def test_a_prompt_in_pieces(tiny_trit_file: Files) -> None:
    model = precise_model(tiny_trit_file("qwen2"), context=32)
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


def test_only_the_last_logits(tiny_trit_file: Files) -> None:
    model = precise_model(tiny_trit_file(), context=32)
    whole = model.forward(TOKENS, all_logits=True)
    model.truncate(0)
    last = model.forward(TOKENS)
    assert last.shape == (448,)
    assert last.dtype == np.float32
    assert_close(last, whole[-1])


@pytest.mark.parametrize("all_logits", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 3, 5, 11])
def test_long_prompts_run_in_batches(
    tiny_trit_file: Files, monkeypatch: pytest.MonkeyPatch, batch_tokens: int, all_logits: bool
) -> None:
    expected = precise_model(tiny_trit_file(), context=32).forward(TOKENS, all_logits=True)
    monkeypatch.setattr("tritgguf.runtime.model.BATCH_TOKENS", batch_tokens)
    model = precise_model(tiny_trit_file(), context=32)
    logits = model.forward(TOKENS, all_logits=all_logits)
    assert_close(logits, expected if all_logits else expected[-1])
    assert model.position == 11


# -- the cache


def test_truncate_and_go_on(tiny_trit_file: Files) -> None:
    model = precise_model(tiny_trit_file(), context=32)
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


def test_context(tiny_trit_file: Files) -> None:
    assert precise_model(tiny_trit_file()).context == 256
    model = precise_model(tiny_trit_file(), context=11)
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
def test_tokens_that_do_not_exist(tiny_trit_file: Files, tokens: list[int]) -> None:
    model = precise_model(tiny_trit_file(), context=8)
    model.forward([1])
    with pytest.raises(TritGgufError, match="tokens must be from 0 to 447"):
        model.forward(tokens)
    assert model.position == 1


def test_two_models_of_one_file_do_not_disturb_each_other(tiny_trit_file: Files) -> None:
    first, second = precise_model(tiny_trit_file(), context=16), precise_model(tiny_trit_file(), context=16)
    expected = expected_logits(tiny_trit_file(), TOKENS)
    for token, row in zip(TOKENS, expected, strict=True):
        second.forward([(token + 1) % 448])
        assert_close(first.forward([token]), row)


def test_logits_of_single_tokens_can_be_kept(tiny_trit_file: Files) -> None:
    model = precise_model(tiny_trit_file(), context=16)
    kept = model.forward([1], all_logits=True)
    before = kept.copy()
    model.forward([2])
    np.testing.assert_array_equal(kept, before)


# -- weights


def test_weights_are_views_of_the_file(tiny_trit_file: Files) -> None:
    file = tiny_trit_file("qwen2")
    weights = precise_model(file, context=8).model._weights
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
    assert weights.embeddings.matrix.data.ctypes.data == file.raw("token_embd.weight").ctypes.data


def test_tied_embeddings_are_the_head(tiny_trit_file: Files) -> None:
    weights = precise_model(tiny_trit_file("llama-tied"), context=8).model._weights
    assert weights.head.matrices[0].data.ctypes.data == weights.embeddings.matrix.data.ctypes.data


def test_config(tiny_trit_file: Files) -> None:
    config = precise_model(tiny_trit_file("qwen2"), context=8).model.config
    assert (config.vocab_size, config.embedding_length, config.layer_count) == (448, 128, 2)
    assert (config.context_length, config.architecture.gguf_name) == (256, "qwen2")
    assert not config.layer_options.interleaved
    assert precise_model(tiny_trit_file("mistral"), context=8).model.config.layer_options.interleaved

"""Mixtures of experts as models: the same bits alone, in a batch, in chunks and with any number of threads."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sequences import open_sequence
from tiny_mixtures import KINDS, write_tiny_mixture

from tritgguf.conversion.convert import convert
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime.model import Model
from tritgguf.runtime.single_sequence import SingleSequence
from tritgguf.runtime.token_batch import TokenBatch

TOKENS = np.random.default_rng(0).integers(0, 256, 60).tolist()
PROMPT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixtures")


@pytest.fixture(params=KINDS)
def mixture(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A tiny mixture of each kind in trits."""
    return converted(folder, request.param)


def converted(folder: Path, kind: str) -> Path:
    """Return the trit file of a kind of mixture, which is made once."""
    file = folder / f"{kind}.gguf"
    if not file.exists():
        convert(write_tiny_mixture(folder / kind, kind), file, depth=2)
    return file


def generated(model: Model) -> np.ndarray:
    """Return the logits of generated tokens behind a prompt: float32 [tokens, vocabulary]."""
    sequence = SingleSequence(model, len(TOKENS))
    sequence.forward(TOKENS[:PROMPT], generated=False)
    return np.array([sequence.forward([token]) for token in TOKENS[PROMPT:]])


def test_prompt_and_generated_tokens_agree(mixture: Path) -> None:
    sequence = open_sequence(GgufFile(mixture), context=len(TOKENS), exact=True, cache_type="f32")
    expected = sequence.forward(TOKENS, all_logits=True)
    alone = open_sequence(GgufFile(mixture), context=len(TOKENS), prefill_bits=16, cache_type="f32")
    found = np.array([alone.forward([token]) for token in TOKENS])
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_the_number_of_threads_changes_no_bit(mixture: Path) -> None:
    file = GgufFile(mixture)
    expected = generated(Model(file, threads=1))
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(generated(Model(file, threads=threads)), expected)


@pytest.mark.parametrize("decode_bits", [8, 16])
def test_a_sequence_does_not_depend_on_the_others(mixture: Path, decode_bits: int) -> None:
    model = Model(GgufFile(mixture), decode_bits=decode_bits)
    alone = generated(model)
    pool = model.new_kv_pool(context=len(TOKENS), sequences=3)
    numbers = [pool.allocate() for _ in range(3)]
    texts = [TOKENS, TOKENS[::-1], TOKENS[5:] + TOKENS[:5]]
    chunks = [(0, 17, True), (17, PROMPT, True), *((n, n + 1, False) for n in range(PROMPT, len(TOKENS)))]
    for first, last, is_prompt in chunks:
        batch = []
        for number, text in zip(numbers, texts, strict=True):
            pool.reserve(number, last - first)
            batch.append((number, first, text[first:last], 1))
        logits = np.empty((3, model.config.vocab_size), np.float32)
        model.forward(TokenBatch.of_chunks(batch, 3 if is_prompt else 0), pool, logits)
        for number in numbers:
            pool.advance(number, last - first)
        if not is_prompt:
            np.testing.assert_array_equal(logits[0], alone[first - PROMPT])


def test_no_numbers_in_a_router_stay_within_the_experts(mixture: Path) -> None:
    model = Model(GgufFile(mixture))
    expected = generated(model)
    routers = model._weights.experts.routers
    kept = routers.copy()
    for odd in (np.nan, np.inf, -np.inf):
        routers[:, 1:3] = odd
        assert generated(model).shape == expected.shape
    routers[:] = kept
    np.testing.assert_array_equal(generated(model), expected)


def test_a_file_larger_than_memory_gives_the_same(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generated(Model(GgufFile(mixture)))
    monkeypatch.setattr("tritgguf.runtime.weights.fits_in_memory", lambda n_bytes: False)
    model = Model(GgufFile(mixture))
    assert model._weights.experts.reads_ahead
    np.testing.assert_array_equal(generated(model), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_used_count": 5}, "there are only 4 experts"),
        ({"expert_count": 0}, "expert_count"),
        ({"expert_count": 5}, r"has the shape \(4, .*, not \(5, "),
        ({"expert_gating_func": 4}, "expert_gating_func"),
        ({"expert_weights_scale": 0.0}, "expert_weights_scale is 0.0, which is not a positive number"),
        ({"expert_weights_scale": float("nan")}, "which is not a positive number"),
        ({"expert_weights_scale": "1" * 1000}, r"expert_weights_scale is '1{39}, which"),
        ({"expert_used_count": [2] * 1000}, r"expert_used_count is .{40}, which"),
        ({"expert_weights_norm": [0.5] * 1000}, r"expert_weights_norm is .{40}, which"),
        ({"expert_feed_forward_length": 32}, r"has the shape \(4, 64, 128\), not \(4, 32, 128\)"),
        ({"expert_feed_forward_length": 24}, "experts of 24 rows are not supported"),
    ],
)
def test_damaged_keys(folder: Path, change: dict[str, object], message: str) -> None:
    file = GgufFile(converted(folder, "qwen3"))
    arch = file.metadata["general.architecture"]
    file.metadata = {**dict(file.metadata), **{f"{arch}.{key}": value for key, value in change.items()}}
    with pytest.raises(TritGgufError, match=message):
        Model(file)


@pytest.mark.parametrize(
    "name",
    [
        "ffn_gate_inp.bias",
        "exp_probs_b.bias",
        "ffn_gate_exps.bias",
        "ffn_up_exps.bias",
        "ffn_down_exps.bias",
        "ffn_gate_inp_shexp.weight",
        "ffn_sub_norm.weight",
    ],
)
@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_a_tensor_that_the_family_has_not_is_refused(folder: Path, name: str, layers: tuple[int, ...]) -> None:
    """Its shape is that of a norm: the kernels would read beyond the end, or add what does not belong there."""
    file = GgufFile(converted(folder, "qwen3"))
    for layer in layers:
        tensor = f"blk.{layer}.{name}"
        file.tensors[tensor] = replace(file.tensors[f"blk.{layer}.attn_norm.weight"], name=tensor)
    message = f"tensor {re.escape(f'blk.{layers[0]}.{name}')} does not belong to a model with these keys"
    with pytest.raises(TritGgufError, match=message):
        Model(file)


@pytest.mark.parametrize("name", ["blk.1.ffn_norm.bias", "output_norm.bias"])
def test_a_layer_norm_without_a_bias_is_refused(folder: Path, name: str) -> None:
    file = GgufFile(converted(folder, "phimoe"))
    del file.tensors[name]
    with pytest.raises(TritGgufError, match=f"tensor {re.escape(name)} is missing; convert the model again"):
        Model(file)


def test_the_bias_of_the_head_is_added_to_every_logit(folder: Path) -> None:
    """To those of prompts and of generated tokens, alone and together."""
    file, without = (GgufFile(converted(folder, "phimoe")) for _ in range(2))
    bias = file.read_float32("output.bias")
    del without.tensors["output.bias"]
    for generated_ones in (False, True):
        for tokens in (TOKENS[:1], TOKENS[:5]):
            logits, others = (
                open_sequence(opened, context=8).forward(tokens, all_logits=True, generated=generated_ones)
                for opened in (file, without)
            )
            np.testing.assert_array_equal(logits, others + bias)

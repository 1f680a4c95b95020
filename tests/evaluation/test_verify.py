"""verify: measures against values computed by hand, the reference model, and complete runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny_model

from tritgguf.conversion.convert import convert
from tritgguf.errors import TritGgufError
from tritgguf.evaluation.divergence import Comparison, compare_logits, compare_windows, largest_difference
from tritgguf.evaluation.text_windows import shipped_text, split_windows
from tritgguf.evaluation.verify import verify, verify_files
from tritgguf.sources.open import open_source

needs_torch = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))), reason="needs the extra `verify`"
)


def logits_of(*rows: list[float]) -> np.ndarray:
    """Return logits of these probabilities plus a different constant per row, which must not matter."""
    shift = np.arange(len(rows), dtype=np.float64)[:, None] * 3
    return (np.log(np.array(rows)) + shift).astype(np.float32)


# -- measures


def test_divergence_of_known_distributions() -> None:
    reference = logits_of([0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.2, 0.2, 0.6])
    logits = logits_of([0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8])
    result = compare_logits(reference, logits, [0, 1])
    # 1/2 ln 2 - 1/4 ln 2 in the first row; 2/5 ln 2 - 3/5 ln 4/3 in the last.
    expected = [0.25 * math.log(2), 0.0, 0.4 * math.log(2) - 0.6 * math.log(4 / 3)]
    np.testing.assert_allclose(result.kl, expected, rtol=1e-6, atol=1e-12)
    assert result.kl_mean == pytest.approx(np.mean(expected), rel=1e-6)
    assert result.same_top.tolist() == [False, True, True]
    assert result.top1_agreement == pytest.approx(2 / 3)


def test_perplexity_is_the_inverse_of_the_geometric_mean_probability() -> None:
    reference = logits_of([0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3])
    logits = logits_of([0.8, 0.1, 0.1], [0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3])
    result = compare_logits(reference, logits, [0, 1])
    assert result.perplexity_reference == pytest.approx((0.5 * 0.1) ** -0.5, rel=1e-6)
    assert result.perplexity == pytest.approx((0.8 * 0.2) ** -0.5, rel=1e-6)


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    logits = np.zeros((4, 50), np.float32)
    assert compare_logits(logits, logits, [1, 2, 3]).perplexity == pytest.approx(50)


def test_perplexity_of_a_broken_model_is_finite() -> None:
    logits = np.array([[5000.0, 0.0]] * 2, np.float32)
    assert math.isfinite(compare_logits(logits, logits, [1]).perplexity)


def test_percentile_interpolates() -> None:
    nothing = np.zeros(1)
    kl = np.arange(201, dtype=np.float64)[::-1]
    assert Comparison(kl, kl > 0, nothing, nothing).kl_p99 == pytest.approx(198.0)
    assert Comparison(kl[:101], kl[:101] > 0, nothing, nothing).kl_p99 == pytest.approx(199.0)
    assert Comparison(kl[:2], kl[:2] > 0, nothing, nothing).kl_p99 == pytest.approx(199.99)


@pytest.fixture
def four_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritgguf.evaluation.divergence._CHUNK_VALUES", 4 * 300 + 1)


@pytest.mark.usefixtures("four_rows_at_once")
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 100])
def test_identical_logits_have_zero_divergence(rows: int) -> None:
    logits = np.random.default_rng(rows).normal(0, 20, (rows, 300)).astype(np.float32)
    result = compare_logits(logits, logits.copy(), [7] * (rows - 1))
    assert len(result.kl) == len(result.same_top) == rows
    assert len(result.nll) == rows - 1
    assert result.kl.max() == 0.0
    assert result.top1_agreement == 1.0
    np.testing.assert_array_equal(result.nll, result.nll_reference)


@pytest.mark.usefixtures("four_rows_at_once")
def test_many_rows_equal_one_row_at_a_time() -> None:
    generator = np.random.default_rng(5)
    reference, logits = generator.normal(0, 4, (2, 77, 300)).astype(np.float32)
    following = generator.integers(0, 300, 77)
    together = compare_logits(reference, logits, following[:76].tolist())
    for row in range(77):
        p, q = (np.exp(values[row].astype(np.float64)) for values in (reference, logits))
        p, q = p / p.sum(), q / q.sum()
        assert together.kl[row] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-9)
        if row < 76:
            assert together.nll[row] == pytest.approx(-math.log(q[following[row]]), rel=1e-9)


def test_divergence_is_never_negative() -> None:
    generator = np.random.default_rng(6)
    reference = generator.normal(0, 9, (64, 500)).astype(np.float32)
    nearly = np.nextafter(reference, np.float32(np.inf))
    assert compare_logits(reference, nearly, []).kl.min() >= 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    logits = np.zeros((3, 4), np.float32)
    broken = logits.copy()
    broken[1, 2] = value
    with pytest.raises(TritGgufError, match="not a number"):
        compare_logits(logits, broken, [0])


@pytest.mark.usefixtures("four_rows_at_once")
@pytest.mark.parametrize("rows", [1, 4, 5, 100])
def test_the_largest_difference(rows: int) -> None:
    reference, logits = np.random.default_rng(rows).normal(0, 9, (2, rows, 300)).astype(np.float32)
    assert largest_difference(reference, logits) == np.abs(reference - logits).max()


def test_windows_are_compared_one_by_one() -> None:
    reference, logits = np.random.default_rng(7).normal(0, 4, (2, 12, 40)).astype(np.float32)
    windows = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12]]
    together = compare_windows(windows, np.split(reference, [5]), np.split(logits, [5]))
    assert len(together.kl) == 12 and len(together.nll) == 10
    np.testing.assert_array_equal(together.kl[5:], compare_logits(reference[5:], logits[5:], windows[1][1:]).kl)
    assert together.as_dict()["kl_mean"] == together.kl_mean
    with pytest.raises(ValueError):
        compare_windows(windows, np.split(reference, [5]), [logits])


# -- text


def test_the_shipped_text_is_long_enough() -> None:
    words = shipped_text().split()
    assert 1400 < len(words) < 1800


def test_windows_split_the_tokens() -> None:
    text = list(range(100, 120))
    assert split_windows(text, count=10, window=4, bos=None) == [text[:4], text[4:8], text[8:10]]
    assert split_windows(text, count=20, window=50, bos=None) == [text]
    assert split_windows(text, count=500, window=8, bos=None) == [text[:8], text[8:16], text[16:]]


def test_every_window_starts_with_bos_which_counts() -> None:
    text = list(range(100, 120))
    assert split_windows(text, count=10, window=4, bos=1) == [[1, *text[:3]], [1, *text[3:6]], [1, text[6]]]
    assert split_windows(text, count=500, window=12, bos=1) == [[1, *text[:11]], [1, *text[11:]]]


def test_a_last_window_without_predictions_is_dropped() -> None:
    text = list(range(9))
    assert split_windows(text, count=9, window=4, bos=None) == [text[:4], text[4:8]]
    assert split_windows(text, count=5, window=4, bos=7) == [[7, 0, 1, 2]]


@pytest.mark.parametrize(("length", "count", "window"), [(0, 10, 4), (1, 10, 4), (9, 1, 4), (9, 0, 4), (9, 9, 1)])
def test_too_little_text(length: int, count: int, window: int) -> None:
    with pytest.raises(TritGgufError, match="at least two tokens"):
        split_windows(list(range(length)), count=count, window=window, bos=None)


# -- the reference model


def as_gguf_source(source: Any) -> Any:
    """Return the same model as a source without a folder, like a stock GGUF file."""
    return SimpleNamespace(name="as GGUF", metadata=source.metadata, tensors=source.tensors, read=source.read)


@needs_torch
@pytest.mark.parametrize(
    "kind",
    ["llama", "llama-tied", "llama-biases", "llama3-rope", "linear-rope", "yarn-rope", "mistral", "qwen2"],
)
def test_keys_and_tensors_make_the_model_that_transformers_loads(tmp_path: Path, kind: str) -> None:
    """Check names, row order, biases and rope scaling of the GGUF form, without our runner."""
    from tritgguf.reference.model import ReferenceModel

    source = open_source(write_tiny_model(tmp_path / kind, kind))
    tokens = list(range(3, 203))
    from_folder = ReferenceModel.open(source).logits(tokens)
    from_keys = ReferenceModel.open(as_gguf_source(source)).logits(tokens)
    assert np.abs(from_folder - from_keys).max() <= 1e-4 * np.abs(from_folder).max()


@needs_torch
@pytest.mark.parametrize(("first", "second"), [("llama", "llama-tied"), ("llama-tied", "llama")])
def test_loading_changes_between_tied_and_separate_heads(tmp_path: Path, first: str, second: str) -> None:
    from tritgguf.reference.model import ReferenceModel

    model = ReferenceModel.open(open_source(write_tiny_model(tmp_path / first, first)))
    other = open_source(write_tiny_model(tmp_path / second, second, seed=1))
    metadata = {key: value.value for key, value in other.metadata.items()}
    model.load_tensors(metadata, [tensor.name for tensor in other.tensors], other.read, "other")
    expected = ReferenceModel.open(other)
    np.testing.assert_allclose(model.logits([5, 6, 7]), expected.logits([5, 6, 7]), atol=1e-6)


@needs_torch
def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from tritgguf.reference.model import ReferenceModel

    source = open_source(write_tiny_model(tmp_path / "model"))
    model = ReferenceModel.open(source)
    metadata = {key: value.value for key, value in source.metadata.items()}
    names = [tensor.name for tensor in source.tensors if tensor.name != "blk.1.ffn_up.weight"]
    with pytest.raises(TritGgufError, match=r"broken\.gguf.*layers\.1\.mlp\.up_proj\.weight"):
        model.load_tensors(metadata, names, source.read, "broken.gguf")


@needs_torch
def test_greedy_takes_the_largest_logit_and_stops(tmp_path: Path) -> None:
    from tritgguf.reference.model import ReferenceModel

    model = ReferenceModel.open(open_source(write_tiny_model(tmp_path / "model")))
    tokens = [5, 6, 7]
    answer = model.greedy(tokens, 8)
    for token in answer:
        assert token == model.logits(tokens)[-1].argmax()
        tokens.append(token)
    stop = answer[5]
    assert model.greedy([5, 6, 7], 8, {stop}) == answer[: answer.index(stop)]


# -- complete runs


@needs_torch
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "llama-tied",
        "llama-no-gqa",
        "llama-biases",
        "linear-rope",
        "unaligned",
        "llama-sentencepiece",
        "llama3-rope",
        "mistral",
        "qwen2",
        "qwen2-tied",
    ],
)
def test_the_runner_computes_the_files_model(tmp_path: Path, kind: str, depth: int) -> None:
    folder = write_tiny_model(tmp_path / kind, kind)
    convert(folder, tmp_path / "model.gguf", depth=depth)
    report = verify(folder, tmp_path / "model.gguf", tokens=160)
    assert report.tokens == 160
    assert report.max_rel_logit_diff <= 1e-5
    assert report.max_rel_logit_diff_int16 <= 1e-3
    assert 0 < report.kl_int8 <= 3e-3
    assert report.kl_mean <= {1: 10, 2: 1, 3: 0.1, 4: 0.02}[depth]


@needs_torch
def test_the_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_model(tmp_path / "model")
    convert(folder, tmp_path / "model.gguf", depth=3)
    capfd.readouterr()
    steps: list[tuple[str, int, int]] = []
    report = verify(folder, tmp_path / "model.gguf", tokens=300, progress=lambda *step: steps.append(step))
    assert capfd.readouterr() == ("", "")
    assert report.tokens == 300
    assert report.windows == 2  # the tiny model's context is 256
    values = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert values["tokens"] == 300
    assert set(values["runner"]) == {"max_rel_logit_diff", "max_rel_logit_diff_int16", "kl_int8"}
    quantization = values["quantization"]
    assert set(quantization) == {"kl_mean", "kl_p99", "top1_agreement", "perplexity", "perplexity_reference"}
    assert 0 < quantization["kl_mean"] < quantization["kl_p99"]
    assert 0.5 < quantization["top1_agreement"] <= 1
    assert all(0 <= done <= total for _, done, total in steps)
    assert list(dict.fromkeys(stage for stage, _, _ in steps)) == [
        "load source",
        "source",
        "load dequantized weights",
        "dequantized",
    ]


@needs_torch
@pytest.mark.parametrize("layers", [False, True])
def test_several_files_give_the_same_reports_as_single_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: bool
) -> None:
    """The source's logits are computed once, and each report equals that of the file alone."""
    from tritgguf.reference.model import ReferenceModel

    folder = write_tiny_model(tmp_path / "model")
    files = [tmp_path / f"d{depth}.gguf" for depth in (2, 3)]
    for depth, file in zip((2, 3), files, strict=True):
        convert(folder, file, depth=depth)
    alone = [verify(folder, file, tokens=300, layers=layers) for file in files]
    opened, computed, stages = [], [], []

    class Counted(ReferenceModel):
        @classmethod
        def open(cls, *arguments: Any, **options: Any) -> ReferenceModel:
            opened.append(arguments)
            return super().open(*arguments, **options)

        def logits(self, tokens: Any) -> np.ndarray:
            computed.append(len(tokens))
            return super().logits(tokens)

    monkeypatch.setattr("tritgguf.reference.model.ReferenceModel", Counted)
    reports = verify_files(folder, files, tokens=300, layers=layers, progress=lambda stage, *_: stages.append(stage))
    assert [dataclasses.replace(report, seconds=0) for report in reports] == [
        dataclasses.replace(report, seconds=0) for report in alone
    ]
    assert len(opened) == 1
    assert len(computed) == 2 + 2 * len(files)  # two windows of the source, and of each file's dequantized weights
    assert {"dequantized of d2.gguf", "dequantized of d3.gguf"} < set(stages)
    assert ("layers of d3.gguf" in stages) == layers
    assert verify_files(folder, []) == []


@needs_torch
def test_files_that_split_the_text_differently_are_refused(tmp_path: Path) -> None:
    for name, context in (("long", 256), ("short", 128)):
        folder = write_tiny_model(tmp_path / name, max_position_embeddings=context)
        convert(folder, tmp_path / f"{name}.gguf", depth=2)
    with pytest.raises(TritGgufError, match=r"short\.gguf splits the text .* than .*long\.gguf; verify it alone"):
        verify_files(tmp_path / "long", [tmp_path / "long.gguf", tmp_path / "short.gguf"], tokens=200)


@needs_torch
def test_a_short_text_is_used_whole(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    convert(folder, tmp_path / "model.gguf", depth=4)
    report = verify(folder, tmp_path / "model.gguf", text="Name three primary colors: red, blue and yellow.")
    assert 2 < report.tokens < 100
    with pytest.raises(TritGgufError, match="at least two tokens"):
        verify(folder, tmp_path / "model.gguf", text="")


@needs_torch
def test_the_wrong_source_is_one_clear_line(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "right")
    convert(tmp_path / "right", tmp_path / "model.gguf", depth=2)
    cases = {
        "architecture llama against qwen2": write_tiny_model(tmp_path / "qwen2", "qwen2"),
        "layers 2 against 3": write_tiny_model(tmp_path / "deeper", num_hidden_layers=3),
        "token_embd.weight has shape": write_tiny_model(tmp_path / "wordier", vocab_size=512),
    }
    for message, folder in cases.items():
        with pytest.raises(TritGgufError, match=message) as caught:
            verify(folder, tmp_path / "model.gguf")
        assert "\n" not in str(caught.value)
        assert "model.gguf" in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TritGgufError, match=r"needs (torch|transformers).*pip install torch transformers accelerate"):
        verify(tmp_path, tmp_path / "model.gguf")


# -- the real model


@needs_torch
@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2(smollm2_folder: Path, smollm2_d2: Path, smollm2_d3: Path) -> None:
    reports = verify_files(smollm2_folder, [smollm2_d2, smollm2_d3], tokens=96)
    for report, (least, most) in zip(reports, [(0.2, 1.0), (0.02, 0.2)], strict=True):
        assert report.max_rel_logit_diff <= 1e-4
        assert report.max_rel_logit_diff_int16 <= 1e-3
        assert 0 < report.kl_int8 <= 3e-3
        assert least < report.kl_mean < most
        assert report.perplexity_reference < report.perplexity


@needs_torch
@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_says_the_same_as_transformers(smollm2_folder: Path, smollm2_d3: Path) -> None:
    from tools.quality import greedy_match

    matches = greedy_match.compare(str(smollm2_folder), str(smollm2_d3), tokens=16)
    assert len(matches) == len(set(greedy_match.PROMPTS)) == 6
    assert [match.prompt for match in matches if match.differs_at is not None] == []
    assert all(match.text == match.reference_text for match in matches)

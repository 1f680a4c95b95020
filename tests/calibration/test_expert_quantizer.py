"""Calibration of mixtures: each expert for the tokens that the original router sends to it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_inputs import WINDOWS as MANY_WINDOWS
from calibration_inputs import logit_error
from tiny_mixtures import EXPERTS, write_tiny_mixture

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.importance import measure_importance, summed_squares
from tritgguf.calibration.sensitivity import measure_sensitivities
from tritgguf.conversion.convert import convert
from tritgguf.conversion.depths import DepthChoice, KeepRule
from tritgguf.conversion.importance_file import importance_of
from tritgguf.errors import TritGgufError
from tritgguf.evaluation.layer_errors import layer_errors
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source

pytest.importorskip("torch")

WINDOWS = np.random.default_rng(0).integers(3, 400, (24, 32)).tolist()
STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 mixture."""
    return write_tiny_mixture(tmp_path_factory.mktemp("mixture") / "model")


def routed_inputs(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return each layer's inputs of the experts, float64 [tokens, width], and the chosen experts."""
    reference = ReferenceModel.open(open_source(folder))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for layer in reference.module.model.layers:
        parts: list[tuple[np.ndarray, np.ndarray]] = []

        def note(module: object, arguments: Any, parts: Any = parts) -> None:
            parts.append((arguments[0].double().numpy(), arguments[1].numpy()))

        handle = layer.mlp.experts.register_forward_pre_hook(note)
        for window in WINDOWS:
            reference.logits(window)
        handle.remove()
        inputs, chosen = zip(*parts, strict=True)
        found.append((np.concatenate(inputs), np.concatenate(chosen)))
    return found


@pytest.mark.parametrize("kind", ["qwen2", "granite", "gpt-oss"])
def test_logits_are_closer_than_with_plain_rounding(tmp_path: Path, kind: str) -> None:
    folder = write_tiny_mixture(tmp_path / "model", kind)
    convert(folder, tmp_path / "v2.gguf", depth=2, threads=1)
    report = convert(folder, tmp_path / "out.gguf", depth=2, encoder="calibrated", windows=MANY_WINDOWS, threads=1)
    assert report.encoder == "calibrated"
    errors = [logit_error(folder, tmp_path / f"{name}.gguf") for name in ("v2", "out")]
    assert errors[1] < 0.8 * errors[0]


def test_experts_themselves_are_calibrated(model: Path, tmp_path: Path) -> None:
    """The errors of the experts' products for their tokens fall."""
    for encoder, windows in (("v2", None), ("calibrated", WINDOWS)):
        convert(model, tmp_path / f"{encoder}.gguf", depth=2, encoder=encoder, windows=windows, threads=1)
    ((inputs, chosen), *_) = routed_inputs(model)
    source = open_source(model)
    errors = {}
    for encoder in ("v2", "calibrated"):
        file = GgufFile(tmp_path / f"{encoder}.gguf")
        errors[encoder] = sum(
            np.square(inputs[(chosen == expert).any(1)] @ (found - original).T.astype(np.float64)).sum()
            for expert, (found, original) in enumerate(
                zip(file.read_float32("blk.0.ffn_up_exps.weight"), source.read("blk.0.ffn_up_exps.weight"), strict=True)
            )
        )
    assert errors["calibrated"] < 0.8 * errors["v2"]


def test_an_expert_without_tokens_falls_back_and_is_counted(model: Path, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "out.gguf", encoder="calibrated", windows=WINDOWS[:1], threads=1)
    (warning,) = report.warnings
    assert "fewer than 32 tokens to 8 of 8 experts" in warning
    convert(model, tmp_path / "best.gguf", encoder="best", threads=1)
    for layer in range(2):
        for name in STACKS:
            tensor = f"blk.{layer}.{name}.weight"
            np.testing.assert_array_equal(
                GgufFile(tmp_path / "out.gguf").raw(tensor), GgufFile(tmp_path / "best.gguf").raw(tensor)
            )


def test_experts_that_stay_in_f16_are_not_counted(model: Path, tmp_path: Path) -> None:
    rules = DepthChoice((KeepRule("*_exps*", 0),))
    settings: dict[str, Any] = {"encoder": "calibrated", "windows": WINDOWS[:1], "threads": 1, "choice": rules}
    assert convert(model, tmp_path / "out.gguf", **settings).warnings == []


@pytest.mark.parametrize("encoder", ["tuned", "tuned-end-to-end"])
def test_experts_are_not_tuned(model: Path, tmp_path: Path, encoder: str) -> None:
    with pytest.raises(TritGgufError, match="experts of a mixture cannot be tuned"):
        convert(model, tmp_path / "out.gguf", encoder=encoder, windows=WINDOWS, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_importance_of_every_expert(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritgguf.calibration.importance.bfloat16_matmul", contextlib.nullcontext)
    sums, counts = summed_squares(open_source(model), WINDOWS, threads=1)
    for layer, (inputs, chosen) in enumerate(routed_inputs(model)):
        for expert in range(EXPERTS):
            tokens = (chosen == expert).any(1)
            gate, up, down = (f"blk.{layer}.{name}.weight[{expert}]" for name in STACKS)
            assert counts[gate] == counts[up] == counts[down] == tokens.sum()
            np.testing.assert_allclose(sums[gate], np.square(inputs[tokens]).sum(0), rtol=1e-3)
            np.testing.assert_array_equal(sums[gate], sums[up])
            assert sums[down].shape == (64,)
    measure_importance(model, tmp_path / "imatrix.gguf", WINDOWS, text="mine", threads=1)
    importance, warnings = importance_of(model, tmp_path / "imatrix.gguf")
    assert warnings == []
    for name, found in importance.items():
        np.testing.assert_allclose(found, sums[name] / counts[name], rtol=1e-3)
    assert set(importance) == {name for name in counts if counts[name]}


def test_sensitivities_of_stacks(model: Path) -> None:
    names = ["blk.0.ffn_up_exps.weight", "blk.1.attn_q.weight"]
    found = measure_sensitivities(open_source(model), names, [1, 2, 3], WINDOWS[:4], ThreadPool(1))
    assert set(found) == set(names)
    for errors in found.values():
        assert errors[1] > errors[2] > errors[3] > 0


def test_layer_errors_count_the_experts(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out.gguf", depth=2, threads=1)
    errors = layer_errors(open_source(model), GgufFile(tmp_path / "out.gguf"), WINDOWS[:4], threads=1)
    convert(model, tmp_path / "exact.gguf", depth=4, threads=1)
    closer = layer_errors(open_source(model), GgufFile(tmp_path / "exact.gguf"), WINDOWS[:4], threads=1)
    assert all(0 < four.own < two.own for four, two in zip(closer, errors, strict=True))

"""The encoder of `convert` where the user names none."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_mixtures import write_tiny_mixture
from tiny_models import write_tiny_model

from tritgguf.calibration.end_to_end import EndToEnd
from tritgguf.cli import app
from tritgguf.conversion.convert import convert
from tritgguf.conversion.default_encoder import (
    about,
    calibration_note,
    calibration_seconds,
    default_encoder,
    training_seconds,
)
from tritgguf.conversion.depths import DepthChoice, DepthOptions, parse_rules
from tritgguf.conversion.encoders import TUNED, V2, Automatic, Calibrated, Encoder, ScaleSearch
from tritgguf.errors import TritGgufError
from tritgguf.exporters.export import export
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.sources.open import open_source
from tritgguf.sources.source import weights_of, weights_of_a_token

default_encoder_module = importlib.import_module("tritgguf.conversion.default_encoder")


def chosen(source: Path, **depths: Any) -> tuple[Encoder, list[str]]:
    found = default_encoder(open_source(str(source)), DepthOptions(**depths), 16384, 2)
    return found.encoder, found.notes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "model")


@pytest.mark.parametrize("depths", [{}, {"depth": 1}, {"depth": 2}])
def test_few_trits_are_calibrated_on_text_of_the_model_s_own(model: Path, depths: dict[str, int]) -> None:
    pytest.importorskip("torch")
    encoder, notes = chosen(model, **depths)
    assert encoder == Calibrated()
    assert len(notes) == 1
    assert "calibrating on 16384 tokens that the model writes: less than a minute" in notes[0]
    assert "--encoder v2" in notes[0]


def test_what_takes_hours_is_calibrated_only_if_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    source = open_source(str(model))
    seconds = calibration_seconds(weights_of(source), 16384, 2)
    monkeypatch.setattr(default_encoder_module, "LONGEST_SECONDS", 0.9 * seconds)
    encoder, (line,) = chosen(model, depth=2)
    assert encoder == ScaleSearch()
    assert line.startswith("not calibrated, because that would take less than a minute")
    assert "--encoder calibrated takes the time" in line
    monkeypatch.setattr(default_encoder_module, "LONGEST_SECONDS", 1.1 * seconds)
    assert chosen(model, depth=2)[0] == Calibrated()
    monkeypatch.setattr(default_encoder_module, "LONGEST_SECONDS", 0.0)
    assert default_encoder(source, DepthOptions(depth=2), 16384, 2, math.inf).encoder == Calibrated()


def test_of_a_mixture_a_token_takes_the_time_of_the_experts_that_it_uses(tmp_path: Path) -> None:
    source = open_source(write_tiny_mixture(tmp_path / "model"))  # a token uses two of four experts
    weights, used = weights_of(source), weights_of_a_token(source)
    experts = sum(math.prod(tensor.shape) for tensor in source.tensors if len(tensor.shape) == 3)
    assert used == weights - experts // 2
    assert calibration_seconds(weights, 16384, 2, used=used) < calibration_seconds(weights, 16384, 2)
    assert calibration_seconds(weights, 0, 2, used=used) == calibration_seconds(weights, 0, 2)


@pytest.mark.parametrize(
    ("seconds", "text"), [(59, "less than a minute"), (61, "about 2 min"), (5399, "about 90 min"), (8000, "about 3 h")]
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert about(seconds) == text


@pytest.mark.parametrize("depth", [3, 4])
def test_more_trits_take_the_best_scales(model: Path, depth: int) -> None:
    assert chosen(model, depth=depth) == (Automatic(ScaleSearch()), [])


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_without_torch_one_line_says_what_is_missed(model: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    encoder, (line,) = chosen(model, depth=2)
    assert encoder == V2()
    assert line.startswith("warning: not calibrated")
    assert f"this needs {package}" in line
    assert "pip install" in line
    assert chosen(model, depth=3)[1] == []


def test_sources_of_trits_need_no_text(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "packed.gguf", depth=2)
    export(tmp_path / "packed.gguf", tmp_path / "dequantized.gguf", to="f16")
    for name in ("packed.gguf", "dequantized.gguf"):
        assert chosen(tmp_path / name, depth=2) == (Automatic(), [])


def test_trits_of_which_fewer_are_asked_for_are_calibrated(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    convert(model, tmp_path / "packed.gguf", depth=3)
    export(tmp_path / "packed.gguf", tmp_path / "dequantized.gguf", to="f16")
    for name in ("packed.gguf", "dequantized.gguf"):
        assert chosen(tmp_path / name, depth=2)[0] == Calibrated()
        assert chosen(tmp_path / name, depth=3)[0] in (Automatic(), Automatic(ScaleSearch()))


@pytest.mark.parametrize(
    ("depth", "rule", "encoder"),
    [(3, "*=2", Calibrated()), (3, "blk.0.ffn_down=2", Automatic(ScaleSearch())), (2, "*=4", Automatic(ScaleSearch()))],
)
def test_rules_count(model: Path, depth: int, rule: str, encoder: Encoder) -> None:
    pytest.importorskip("torch")
    assert chosen(model, depth=depth, choice=DepthChoice(tuple(parse_rules(rule))))[0] == encoder
    assert chosen(model, depth=depth, choice=DepthChoice(tuple(parse_rules("*=0"))))[0] == Automatic()


def test_depths_that_contradict_the_source_are_refused_before_a_text_is_written(tmp_path: Path) -> None:
    tied = write_tiny_model(tmp_path / "tied", "qwen2-tied")
    with pytest.raises(TritGgufError, match="are one tensor"):
        chosen(tied, output_depth=4, embedding_depth=3)


def test_the_estimate_grows_with_weights_and_tokens_and_shrinks_with_threads() -> None:
    seconds = calibration_seconds(10**9, 16384, 2)
    assert calibration_seconds(2 * 10**9, 16384, 4) == pytest.approx(seconds)
    assert 3 * seconds < calibration_seconds(10**9, 32768, 1) < 4 * seconds


def test_the_estimate_of_training_counts_the_passes() -> None:
    tokens = 64 * 512
    short, long = (training_seconds(10**9, tokens, EndToEnd(epochs=epochs), 2) for epochs in (2, 4))
    assert long == pytest.approx(2 * short)
    assert training_seconds(10**9, tokens, EndToEnd(most_steps=28), 2) == pytest.approx(short)


def test_the_estimate_counts_everything_that_is_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tokens = open_source(str(model)), 64 * 512
    found: list[float] = []

    def remembered(seconds: float) -> str:
        found.append(seconds)
        return ""

    monkeypatch.setattr(default_encoder_module, "about", remembered)
    calibration_note(source, Calibrated(), tokens, 2)
    calibration_note(source, Calibrated(), tokens, 2, measures=True)
    words = [calibration_note(source, encoder, tokens, 2).partition(" on ")[0] for encoder in TUNED.values()]
    assert words == [
        "calibrating and training blocks",
        "calibrating and training end to end",
        "calibrating, training blocks and training end to end",
    ]
    plain, measuring, blocks, end_to_end, both = found
    assert plain < measuring < blocks
    assert both - plain == pytest.approx(blocks - plain + end_to_end - plain)


def test_the_command_calibrates_and_says_so(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "out.gguf"
    assert app.main(["convert", str(model), str(out), "--tokens", "256"]) == 0
    assert " ".join(capsys.readouterr().err.split()).count("calibrating on 256 tokens") == 1
    assert GgufFile(out).metadata["trit.encoder"] == "calibrated"
    assert app.main(["convert", str(model), str(out), "--depth", "3", "--overwrite"]) == 0
    assert GgufFile(out).metadata["trit.encoder"] == "best"
    assert app.main(["convert", str(model), str(out), "--target-bpw", "3", "--tokens", "256", "--overwrite"]) == 0
    assert " ".join(capsys.readouterr().err.split()).count("calibrating on 256 tokens: less than a minute") == 1

"""Encoders: their names, their inputs, and that a type writes the same file as its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny_model

from tritgguf.calibration.tuning import Tuning
from tritgguf.conversion.convert import convert
from tritgguf.conversion.depths import DepthChoice
from tritgguf.conversion.encoders import (
    V2,
    Automatic,
    Calibrated,
    Encoder,
    ImportanceSearch,
    Quantizer,
    Recover,
    ScaleSearch,
    encoder_names,
    parse_encoder,
    quantizer_of,
    with_tuning,
)
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile

WINDOWS = np.random.default_rng(0).integers(3, 400, (4, 64)).tolist()
IMPORTANCE = {"blk.0.attn_q.weight": np.linspace(0, 1, 128, dtype=np.float32)}
TEXT_ENCODERS = ["calibrated", "tuned-end-to-end", "tuned-both", "tuned"]
QUANTIZERS = ["v2", "best", "imatrix", *TEXT_ENCODERS]


def test_names() -> None:
    assert encoder_names() == ["auto", "recover", *(f"recover+{name}" for name in QUANTIZERS), *QUANTIZERS]
    for name in encoder_names():
        assert parse_encoder(name).name == name
    assert parse_encoder("auto") == Automatic()
    assert parse_encoder("recover+tuned") == Recover(Calibrated(tuning=Tuning()))


@pytest.mark.parametrize("name", ["v1", "V2", "", "v2+best", "recover+", "recover+auto", "recover+recover", "auto+v2"])
def test_unknown_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(TritGgufError, match=r"^encoder .* does not exist; choose from auto, recover, .*, tuned$"):
        parse_encoder(name)
    with pytest.raises(TritGgufError, match="does not exist; choose from"):
        convert(tmp_path / "is not read", tmp_path / "out.gguf", encoder=name)


def test_which_encoders_need_a_text() -> None:
    need = [name for name in encoder_names() if parse_encoder(name).needs_text]
    assert need == [f"{first}{second}" for first in ("recover+", "") for second in TEXT_ENCODERS]
    assert not Recover(Calibrated(WINDOWS)).needs_text


@pytest.mark.parametrize(
    ("encoder", "tuned"),
    [
        ("auto", "tuned"),
        ("calibrated", "tuned"),
        ("tuned", "tuned"),
        ("recover+calibrated", "recover+tuned"),
        ("recover+tuned", "recover+tuned"),
    ],
)
def test_with_tuning(encoder: str, tuned: str) -> None:
    assert with_tuning(parse_encoder(encoder)).name == tuned


def test_tuning_does_not_replace_another_one() -> None:
    assert with_tuning(parse_encoder("tuned-both"), "both").name == "tuned-both"
    with pytest.raises(TritGgufError, match="--tune end-to-end contradicts the encoder tuned; omit one of them"):
        with_tuning(parse_encoder("tuned"), "end-to-end")


@pytest.mark.parametrize("encoder", ["v2", "best", "imatrix", "recover", "recover+v2"])
def test_tuning_needs_an_encoder_with_a_text(encoder: str) -> None:
    with pytest.raises(TritGgufError) as caught:
        with_tuning(parse_encoder(encoder))
    assert f"which the encoder {encoder} does not take" in str(caught.value)


@pytest.mark.parametrize(
    ("encoder", "inputs", "quantizer"),
    [
        (Automatic(), {}, V2),
        (Automatic(), {"importance": IMPORTANCE}, ImportanceSearch),
        (Automatic(), {"windows": WINDOWS}, Calibrated),
        (Automatic(ScaleSearch()), {}, ScaleSearch),
        (Recover(), {"windows": WINDOWS}, Calibrated),
        (Recover(V2()), {}, V2),
        (ImportanceSearch(), {"importance": {}}, ImportanceSearch),
        (ImportanceSearch(IMPORTANCE), {}, ImportanceSearch),
        (Calibrated(WINDOWS), {}, Calibrated),
        (V2(), {"windows": WINDOWS, "text_has_other_use": True}, V2),
    ],
)
def test_inputs_reach_the_quantizer(encoder: Encoder, inputs: dict[str, Any], quantizer: type[Quantizer]) -> None:
    found = quantizer_of(encoder, **{"importance": None, "windows": None} | inputs)
    assert type(found) is quantizer
    if isinstance(found, ImportanceSearch):
        assert found.importance is inputs.get("importance", IMPORTANCE)
    if isinstance(found, Calibrated):
        assert found.windows is WINDOWS


@pytest.mark.parametrize(
    ("encoder", "inputs", "message"),
    [
        (V2(), {"importance": IMPORTANCE}, "importance matrix go together"),
        (ImportanceSearch(), {}, "importance matrix go together"),
        (ImportanceSearch(IMPORTANCE), {"importance": IMPORTANCE}, "importance matrix go together"),
        (Calibrated(), {}, "calibration text go together"),
        (Calibrated(), {"text_has_other_use": True}, "calibration text go together"),
        (Calibrated(WINDOWS), {"windows": WINDOWS}, "calibration text go together"),
        (Recover(ScaleSearch()), {"windows": WINDOWS}, "calibration text go together"),
        (Automatic(), {"importance": IMPORTANCE, "windows": WINDOWS}, "give one of them"),
    ],
)
def test_inputs_that_do_not_fit(encoder: Encoder, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(TritGgufError, match=message):
        quantizer_of(encoder, **{"importance": None, "windows": None} | inputs)


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("v2", V2()),
        ("best", ScaleSearch()),
        ("imatrix", ImportanceSearch(IMPORTANCE)),
        ("auto", Automatic()),
        ("calibrated", Calibrated(WINDOWS)),
        ("tuned", Calibrated(WINDOWS, Tuning())),
        ("recover+best", Recover(ScaleSearch())),
    ],
)
def test_a_type_writes_the_file_of_its_name(tmp_path: Path, name: str, encoder: Encoder) -> None:
    inputs: dict[str, Any] = {"importance": IMPORTANCE} if name == "imatrix" else {}
    if name in ("calibrated", "tuned"):
        pytest.importorskip("torch")
        inputs = {"windows": WINDOWS}
    source = write_tiny_model(tmp_path / "model")
    convert(source, tmp_path / "name.gguf", encoder=name, threads=2, **inputs)
    report = convert(source, tmp_path / "type.gguf", encoder=encoder, threads=2)
    assert (tmp_path / "type.gguf").read_bytes() == (tmp_path / "name.gguf").read_bytes()
    assert report.encoder == GgufFile(tmp_path / "type.gguf").metadata["trit.encoder"]


def test_depths_are_measured_on_the_text_of_the_encoder(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source, choice = write_tiny_model(tmp_path / "model"), DepthChoice(target_bpw=3.0)
    convert(source, tmp_path / "a.gguf", encoder="calibrated", windows=WINDOWS, choice=choice, threads=2)
    convert(source, tmp_path / "b.gguf", encoder=Calibrated(WINDOWS), choice=choice, threads=2)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_importance_of_another_model(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    importance = {"blk.0.attn_q.weight": np.ones(64, np.float32)}
    with pytest.raises(TritGgufError, match=r"model: tensor blk\.0\.attn_q\.weight has 128 columns, its importance"):
        convert(source, tmp_path / "out.gguf", importance=importance)
    assert not (tmp_path / "out.gguf").exists()

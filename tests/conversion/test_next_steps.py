"""What a conversion tells the user to do next."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tritgguf.conversion.next_steps import next_steps
from tritgguf.conversion.report import ConvertReport


def report(depth: int, encoder: str, weights: int = 134_515_008) -> ConvertReport:
    return ConvertReport(Path("my model.gguf"), "models/SmolLM2", depth, encoder, weights=weights, used_weights=weights)


@pytest.mark.parametrize(("depth", "encoder"), [(3, "calibrated"), (4, "best"), (2, "calibrated"), (1, "recover")])
def test_a_good_file_is_run(depth: int, encoder: str) -> None:
    assert next_steps(report(depth, encoder)) == ["run it: tritgguf run 'my model.gguf' -p \"Why is the sky blue?\""]


def test_a_file_from_trits_is_not_calibrated_on_them() -> None:
    assert len(next_steps(dataclasses.replace(report(2, "v2"), from_trits=True))) == 1


def test_an_uncalibrated_small_file_should_be_calibrated() -> None:
    advice = next_steps(report(2, "v2"))[1]
    assert "about 3 min" in advice
    assert advice.endswith("the same command with --encoder calibrated --overwrite does it")
    assert "6 times" in next_steps(report(3, "best"))[1]
    assert "about 25 min" in next_steps(report(1, "best", 1_543_714_304))[1]
    mixture = dataclasses.replace(report(2, "best", 30_500_000_000), used_weights=3_300_000_000)
    assert "about 3 h" in next_steps(mixture)[1]

"""Memory of commands: the measurement, the peaks of the curve, the chart."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.memory import curve
from tools.memory.chart import draw
from tools.memory.curve import BOUND, Run, markdown, measure, thinned

CONVERT = Run("convert", "tritgguf convert", 10.0, 900_000_000, 50_000_000, [(0.0, 1, 0), (9.0, 900_000_000, 0)])
INSPECT = Run("inspect", "tritgguf inspect", 0.5, 2_000_000_000, 1, [(0.0, 2_000_000_000, 1)])
RESULT: dict[str, Any] = {
    "bound": BOUND,
    "processor": "a <processor>",
    "shapes": {"72b": [vars(CONVERT)], "7b": [vars(INSPECT)]},
}


@given(count=st.integers(1, 500), most=st.integers(1, 60), seed=st.integers(0, 100))
def test_thinning_keeps_the_peaks(count: int, most: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1000, (count, 2)).tolist()
    samples = [(0.02 * place, own, files) for place, (own, files) in enumerate(values)]
    kept = thinned(samples, most)
    assert len(kept) <= most
    assert max(own for _, own, _ in kept) == max(own for own, _ in values)
    assert max(files for _, _, files in kept) == max(files for _, files in values)
    assert [time for time, _, _ in kept] == sorted(time for time, _, _ in kept)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_command_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "program"
    code = """import sys, time
if sys.argv[1:] == ["fail"]: sys.exit("no room")
x = bytearray(bytes(60_000_000)); sum(range(10_000_000)); time.sleep(1)"""
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{code}' ${{3:-}}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    run = measure("it", [])
    assert 50_000_000 < run.peak_own < 200_000_000
    assert run.peak_own == max(own for _, own, _ in run.curve)
    assert 0 < run.processor_seconds < 60
    with pytest.raises(SystemExit, match=r"it failed: .*no room"):
        measure("it", ["fail"])


def test_chart_and_table() -> None:
    chart = draw(RESULT)
    root = ElementTree.fromstring(chart)
    assert len(root.findall("{http://www.w3.org/2000/svg}polygon")) == 2
    assert "peak 0.90 GB" in chart
    assert "72b: convert" in chart
    assert "a &lt;processor&gt;" in chart
    assert "| 7b | inspect | 2.00 GB | 0.00 GB | 0 |" in markdown(RESULT)


@pytest.mark.parametrize(("kept", "code"), [(["72b", "7b"], 1), (["72b"], 0), ([], 0)])
def test_the_bound_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: list[str], code: int
) -> None:
    file = tmp_path / "memory.json"
    file.write_text(json.dumps({**RESULT, "shapes": {name: RESULT["shapes"][name] for name in kept}}))
    arguments = ["curve.py", "--json", str(file), "--plot", str(tmp_path / "memory.svg")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert curve.main() == code
    assert ("| 72b |" in capsys.readouterr().out) == bool(kept)
    assert (tmp_path / "memory.svg").exists()

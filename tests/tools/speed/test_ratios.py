"""The comparison's names, bounds, JSON, tables and chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tools.speed.chart import draw
from tools.speed.ratios import GOALS, Ratio, Result, Samples, Side, markdown, read_result, table, verdict
from tritgguf.errors import TritGgufError
from tritgguf.formats import svg

# What others read from the JSON.
KEYS = (
    "decode.trit2/q4_0",
    "decode.trit2/q3_k_s",
    "decode.trit1/tq2_0",
    "decode.trit3/q5_k_s",
    "decode.trit4/q6_k",
    "prefill.trit2/q3_k_s",
    "prefill.trit2/q4_0",
    "prefill.trit3/q5_k_s",
    "batch4.trit2/q4_0",
    "batch8.trit2/q4_0",
    "convert.v2/q4_0",
    "convert.v2/q3_k_s",
    "decode.trit2/read_bandwidth",
)


def samples(ours: float, theirs: float, unit: str = "tokens/s") -> Samples:
    result = Samples(unit)
    result.add(ours, theirs, 0.25)
    return result


@pytest.fixture
def result() -> Result:
    """Return a result with a ratio that passes, one that fails and one without a bound."""
    result = Result("qwen2.5-1.5b", 2, "a <fast> processor", "llama.cpp 1", "avx2")
    for name, ours, unit in (
        ("convert.v2/q4_0", 5e6, "weights/s"),
        ("decode.trit2/q3_k_s", 4.0, "tokens/s"),
        ("decode.trit2/q4_0", 6.0, "tokens/s"),
    ):
        theirs = 4e6 if unit == "weights/s" else 4.0
        result.add(name, samples(ours, theirs, unit), "2026-01-02", "abc")
    return result


def test_the_promised_names_are_there() -> None:
    assert set(KEYS) <= set(GOALS)


def test_names_in_parts() -> None:
    shape = "qwen2.5-1.5b"
    assert Ratio.parse("decode.trit1/tq2_0", shape) == Ratio(
        "decode.trit1/tq2_0", "decode", Side(shape, "trit1"), Side(shape, "tq2_0")
    )
    ratio = Ratio.parse("decode.smollm2.trit2/q4_0", shape)
    assert (ratio.ours, ratio.theirs) == (Side("smollm2-135m", "trit2"), Side("smollm2-135m", "q4_0"))
    ratio = Ratio.parse("decode.trit2.context4096/context0", shape)
    assert (ratio.ours, ratio.theirs) == (Side(shape, "trit2", "context4096"), Side(shape, "trit2", "context0"))
    units = {name: Ratio.parse(name, shape).unit for name in GOALS}
    assert units["convert.v2/q4_0"] == "weights/s"
    assert units["decode.trit2/read_bandwidth"] == "bytes/s"
    assert units["prefill.trit2/q4_0"] == units["batch4.trit2/q4_0"] == "tokens/s"
    with pytest.raises(TritGgufError, match=r"decode\.trit9/q4_0 is no ratio"):
        Ratio.parse("decode.trit9/q4_0", shape)


def test_the_ratio_is_of_medians() -> None:
    measured = Samples("tokens/s")
    for ours, theirs in ((30, 1), (10, 5), (20, 100)):
        measured.add(ours, theirs, 0.25)
    assert measured.ratio == 4
    assert measured.as_dict()["ours"] == 20
    assert measured.as_dict()["theirs_samples"] == [1, 5, 100]


def test_verdicts() -> None:
    assert [verdict("decode.trit2/q4_0", ratio) for ratio in (0.99, 1.0, 3.0)] == ["fail", "pass", "pass"]
    assert verdict("convert.v2/q4_0", 0.1) == ""


def test_the_json(result: Result) -> None:
    content = json.loads(json.dumps(result.json))
    assert list(content["ratios"].items()) == [
        ("decode.trit2/q4_0", 1.5),
        ("decode.trit2/q3_k_s", 1.0),
        ("convert.v2/q4_0", 1.25),
    ]
    assert content["bounds"] == {"decode.trit2/q4_0": 1.0, "decode.trit2/q3_k_s": 1.5, "convert.v2/q4_0": None}
    assert content["absolute"]["processor"] == "a <fast> processor"
    entry = content["absolute"]["decode.trit2/q4_0"]
    assert (entry["ours"], entry["theirs"], entry["measured"], entry["revision"]) == (6.0, 4.0, "2026-01-02", "abc")


def test_results_are_merged(result: Result, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    result.write(file)
    later = Result("qwen2.5-1.5b", 2, "a <fast> processor", "llama.cpp 1", "avx2")
    later.merge(file)
    later.add("decode.trit2/q3_k_s", samples(8, 4), "2026-01-03", "def")
    later.write(file)
    merged = read_result(file)
    assert merged["ratios"] == {"decode.trit2/q4_0": 1.5, "decode.trit2/q3_k_s": 2.0, "convert.v2/q4_0": 1.25}
    assert [merged["absolute"][name]["revision"] for name in merged["ratios"]] == ["abc", "def", "abc"]
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


@pytest.mark.parametrize("part", range(5))
def test_other_circumstances_are_not_merged(result: Result, tmp_path: Path, part: int) -> None:
    result.write(tmp_path / "speed.json")
    circumstances: list[Any] = ["qwen2.5-1.5b", 2, "a <fast> processor", "llama.cpp 1", "avx2"]
    circumstances[part] = 3 if part == 1 else "another"
    with pytest.raises(TritGgufError, match=r"another .*choose another --output"):
        Result(*circumstances).merge(tmp_path / "speed.json")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"ratios": 1}', "nonsense"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "speed.json").write_text(content)
    with pytest.raises(TritGgufError, match="is no result of this tool"):
        read_result(tmp_path / "speed.json")


def test_what_cannot_be_written_is_one_line(result: Result, tmp_path: Path) -> None:
    for write in (result.write, lambda file: svg.write(file, draw(result.json))):
        with pytest.raises(TritGgufError, match="cannot be written"):
            write(tmp_path / "no folder" / "file")


def test_tables(result: Result) -> None:
    title, columns, rows = table(result.json)
    assert "a <fast> processor" in title
    assert all(len(row) == len(columns) for row in rows)
    assert rows == [
        ("decode.trit2/q4_0", "1.50", "1.0", "pass", "6.0", "4.0", "tokens/s", "25%"),
        ("decode.trit2/q3_k_s", "1.00", "1.5", "fail", "4.0", "4.0", "tokens/s", "25%"),
        ("convert.v2/q4_0", "1.25", "", "", "5.0", "4.0", "M weights/s", "25%"),
    ]
    lines = markdown(result.json).splitlines()
    assert lines[2] == "| decode, d=2 over Q4_0 (1.3 times the bits) | 1.50 | 1.0 | 1.4 |"
    assert lines[4].endswith("| 1.25 |  |  |")


def test_the_chart(result: Result, tmp_path: Path) -> None:
    svg.write(tmp_path / "speed.svg", draw(result.json))
    text = (tmp_path / "speed.svg").read_text()
    assert text == draw(result.json)
    root = ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    bars = root.findall(f"{name}rect")
    assert [bar.get("class") for bar in bars] == ["pass", "fail", "none"]
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert widths[0] / widths[1] == pytest.approx(1.5, rel=0.01)
    marks = [line for line in root.findall(f"{name}line") if line.get("class") == "bound"]
    left = float(bars[0].get("x", 0))
    # The second bar ends where the first one's bound is, and the first where the second one's is.
    assert [float(mark.get("x1", 0)) - left for mark in marks] == pytest.approx([widths[1], widths[0]], abs=0.2)
    texts = [element.text for element in root.findall(f"{name}text")]
    assert {"1.50", "1.00", "1.25", GOALS["decode.trit2/q4_0"].label} <= set(texts)
    assert "prefers-color-scheme: dark" in text
    _, _, width, height = map(float, root.get("viewBox", "").split())
    for element in root.findall(f"{name}text"):
        assert 0 <= float(element.get("x", 0)) <= width
        assert 0 <= float(element.get("y", 0)) <= height

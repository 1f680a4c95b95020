"""compare: several files in one table, against their source or the first of them, and the chart."""

from __future__ import annotations

import importlib.util
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Capture, fails
from tiny_models import write_tiny_model

from tritgguf.cli import app
from tritgguf.conversion.convert import convert
from tritgguf.errors import TritGgufError
from tritgguf.evaluation.chart import chart
from tritgguf.evaluation.compare import compare_files
from tritgguf.evaluation.logits_store import LogitsStore
from tritgguf.evaluation.quantization_costs import FileQuality
from tritgguf.evaluation.verify import verify_files
from tritgguf.formats.gguf_file import GgufFile

needs_torch = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))), reason="needs the extra `verify`"
)
MEASURES = ("kl_mean", "kl_p99", "top1_agreement", "perplexity")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("compare") / "model")


@pytest.fixture(scope="module")
def files(source: Path) -> list[Path]:
    paths = [source.with_name(f"d{depth}.gguf") for depth in (4, 3, 2)]
    for depth, path in zip((4, 3, 2), paths, strict=True):
        convert(source, path, depth=depth, recipe="published", encoder="v2")
    return paths


def untouched(*arguments: Any, **options: Any) -> None:
    raise AssertionError("this must not be reached")


def test_the_first_file_is_the_reference(files: list[Path]) -> None:
    stages: list[tuple[str, int, int]] = []
    report = compare_files(files, tokens=200, progress=lambda *stage: stages.append(stage))
    assert report.reference == str(files[0])
    assert (report.tokens, [row.file for row in report.files]) == (200, files)
    first, *others = report.files
    assert (first.kl_mean, first.kl_p99, first.top1_agreement) == (0.0, 0.0, 1.0)
    assert first.perplexity == report.perplexity_reference
    assert 0 < others[0].kl_mean < others[1].kl_mean
    assert first.file_bytes > others[0].file_bytes > others[1].file_bytes
    for row in report.files:
        assert row.bits_per_weight == pytest.approx(
            8 * row.file_bytes / sum(info.n_weights for info in GgufFile(row.file).tensors.values())
        )
    assert stages[-1] == ("source", 1, 1)


@needs_torch
def test_against_the_source_it_measures_what_verify_does(
    source: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LogitsStore(tmp_path, 1 << 30)
    verified = verify_files(source, files[:1], tokens=300, store=store)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("tritgguf.reference.model.ReferenceModel.open", untouched)
    report = compare_files(files, source=source, tokens=300, store=store)
    assert report.perplexity_reference == verified[0].perplexity_reference
    assert {name: getattr(report.files[0], name) for name in MEASURES} == {
        name: getattr(verified[0], name) for name in MEASURES
    }
    monkeypatch.undo()
    without_store = compare_files(files, source=source, tokens=300)
    assert without_store.files == report.files
    store_of_compare = LogitsStore(tmp_path / "other", 1 << 30)
    assert compare_files(files, source=source, tokens=300, store=store_of_compare).files == report.files
    kept = [next(folder.glob("*.npy")).read_bytes() for folder in (tmp_path, tmp_path / "other")]
    assert kept[0] == kept[1]


def test_files_of_other_models_are_refused(
    files: list[Path], tmp_path: Path, tiny_trit_file: Callable[..., GgufFile]
) -> None:
    wider = write_tiny_model(tmp_path / "wider", vocab_size=512)
    convert(wider, tmp_path / "wider.gguf", depth=2, recipe="published", encoder="v2")
    with pytest.raises(TritGgufError, match=r"wider\.gguf: has a vocabulary of 512 tokens, not 448"):
        compare_files([files[0], tmp_path / "wider.gguf"], tokens=50)
    with pytest.raises(TritGgufError, match="was not converted from"):
        compare_files(files, source=wider, tokens=50)


def test_the_command(files: list[Path], tmp_path: Path, capsys: Capture) -> None:
    plot = tmp_path / "chart.svg"
    arguments = [*map(str, files), "--tokens", "60", "--plot", str(plot)]
    assert app.main(["compare", *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^Against \S+d4\.gguf with a perplexity of [\d.]+, 60 tokens$", out, re.MULTILINE)
    number = r"[\d.]+"
    for name in ("d4", "d3", "d2"):
        row = rf"^  \S+{name}\.gguf +{number} kB +{number} +{number} +{number} +{number}% +{number} +{number}$"
        assert re.search(row, out, re.MULTILINE), out
    assert out.splitlines()[1].endswith("tokens/s")
    texts = [element.text for element in ElementTree.parse(plot).iter() if element.tag.endswith("text")]
    assert {"d3", "d2", "size in GB"} <= set(texts)
    assert "d4" not in texts
    assert app.main(["compare", *arguments, "--no-speed", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["tokens_per_second"] for row in report["files"]] == [None] * 3
    assert report["reference"] == str(files[0])


def test_what_is_wrong_is_said_before_anything_is_measured(
    files: list[Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritgguf.evaluation.compare.common_windows", untouched)
    file = str(files[0])
    assert "its folder does not exist" in fails(capsys, "compare", file, "--plot", str(tmp_path / "none" / "x.svg"))
    assert "would replace" in fails(capsys, "compare", file, "--plot", file)
    assert "missing.gguf" in fails(capsys, "compare", file, "missing.gguf")
    monkeypatch.setenv("TRITGGUF_LOGITS", "much")
    assert "TRITGGUF_LOGITS is much" in fails(capsys, "compare", file)


# ---- the chart ----


def quality(name: str, file_bytes: int, kl: float) -> FileQuality:
    return FileQuality(Path(name), file_bytes, 4.0, kl, 2 * kl, 0.9, 10.0)


@pytest.mark.parametrize(
    "rows",
    [
        [("a <b>.gguf", 400_000_000, 0.5), ("c.gguf", 700_000_000, 0.02), ("d.gguf", 900_000_000, 0.0)],
        [("one.gguf", 1_000, 0.1)],
        [("same.gguf", 1_000, 0.1), ("size.gguf", 1_000, 0.1)],
        [(f"{number}.gguf", 10**number, 10.0**-number) for number in range(3, 12)],
    ],
)
def test_every_point_lies_inside(rows: list[tuple[str, int, float]]) -> None:
    root = ElementTree.fromstring(chart("Title", "subtitle", [quality(*row) for row in rows]))
    points = [element.attrib for element in root.iter() if element.tag.endswith("circle")]
    assert len(points) == sum(kl > 0 for _, _, kl in rows)
    for point in points:
        assert 64 <= float(point["cx"]) <= 696
        assert 74 <= float(point["cy"]) <= 372
    assert sum(element.tag.endswith("line") for element in root.iter()) >= 4


def test_larger_is_right_and_worse_is_up() -> None:
    root = ElementTree.fromstring(chart("", "", [quality("a", 100, 0.5), quality("b", 200, 0.1)]))
    small, large = [element.attrib for element in root.iter() if element.tag.endswith("circle")]
    assert float(small["cx"]) < float(large["cx"])
    assert float(small["cy"]) < float(large["cy"])


def test_nothing_to_plot() -> None:
    with pytest.raises(TritGgufError, match="nothing to plot"):
        chart("", "", [quality("a", 100, 0.0)])

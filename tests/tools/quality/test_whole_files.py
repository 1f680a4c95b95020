"""The parts of tools/quality/whole_files.py: what is made for a row, the marks, the table and the chart."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from converted_models import as_stock_gguf
from gguf import GGMLQuantizationType
from tiny_models import write_tiny_model

from tools.llama_cpp import binaries
from tools.quality import whole_files
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.sources.open import open_source


class FakeMeasurement:
    """A text, and the names of the files that were compared."""

    calibration = ([5, 6, 7, 8] * 16, [9, 10, 11, 12] * 16)

    def __init__(self) -> None:
        self.compared: list[str] = []

    def compare_file(self, path: Path) -> Any:
        class Comparison:
            kl_mean, kl_p99, perplexity, top1_agreement = 0.25, 1.0, 9.0, 0.75

        self.compared.append(path.name)
        return Comparison()

    def write_calibration_text(self, file: Path) -> None:
        file.write_text("a text")


@pytest.fixture
def made(tmp_path: Path) -> whole_files.WholeFiles:
    source = write_tiny_model(tmp_path / "model")
    return whole_files.WholeFiles("smollm2", FakeMeasurement(), source, tmp_path / "files", "v2", 2)  # type: ignore[arg-type]


def test_our_file_has_its_recipe_and_depth(made: whole_files.WholeFiles, tmp_path: Path) -> None:
    row = made.row("small-d1")
    path = tmp_path / "files" / "model-small-d1-v2.gguf"
    assert (row.name, row.file_bytes, row.kl_mean) == ("small-d1", path.stat().st_size, 0.25)
    assert not row.on_grid
    tensors = GgufFile(path).tensors
    assert tensors["blk.0.ffn_up.weight"].type_name == "TRIT1"
    assert tensors["output.weight"].type_name != "F16"
    before = path.stat().st_mtime_ns
    made.row("small-d1")
    assert path.stat().st_mtime_ns == before


def test_a_mixture_is_made_by_llama_cpp_from_f16(
    made: whole_files.WholeFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    files = tmp_path / "files"

    def run(command: list[str], log: Path) -> None:
        commands.append([part.removeprefix(f"{files}/") for part in command])
        if command[0].endswith("llama-quantize"):
            as_stock_gguf(open_source(tmp_path / "model"), Path(command[4]), matrices=GGMLQuantizationType.Q4_1)

    monkeypatch.setattr(binaries, "build_llama_cpp", lambda cache: Path("programs"))
    monkeypatch.setattr(binaries, "run_logged", run)
    row = made.row("Q4_K_M")
    assert [" ".join(command) for command in commands] == [
        "programs/llama-imatrix -m model-F16.gguf -f model-calibration.txt -o model-imatrix.gguf -c 512 --chunks 2"
        " --no-ppl -t 2",
        "programs/llama-quantize --imatrix model-imatrix.gguf model-F16.gguf model-Q4_K_M.gguf Q4_K_M 2",
    ]
    assert {info.type_name for info in GgufFile(files / "model-F16.gguf").tensors.values()} == {"F16", "F32"}
    assert row.on_grid


@pytest.mark.parametrize(("type_name", "on_grid"), [("Q4_1", True), ("Q5_1", True), ("Q4_0", False), ("F16", False)])
def test_types_that_hold_the_source_s_weights_are_marked(tmp_path: Path, type_name: str, on_grid: bool) -> None:
    source = open_source(write_tiny_model(tmp_path / "model"))
    path = as_stock_gguf(source, tmp_path / "stock.gguf", matrices=GGMLQuantizationType[type_name])
    assert whole_files.is_on_grid(path, "Q4_1") == on_grid


RESULT: dict[str, Any] = {
    "model": "smollm2",
    "rows": [
        {"name": name, "file_bytes": size, "on_grid": on_grid, "kl_mean": kl, "kl_p99": 1.5, "top1_agreement": 0.8}
        for name, size, on_grid, kl in [
            ("published-d2", 106_800_000, False, 0.12),
            ("balanced-d2", 73_000_000, False, 0.122),
            ("balanced-d3", 97_000_000, False, 0.012),
            ("Q2_K", 88_000_000, False, 0.7),
            ("Q5_K_M", 112_000_000, True, 0.01),
        ]
    ],
}


def test_table() -> None:
    lines = whole_files.markdown(RESULT).splitlines()
    assert lines[2] == "| balanced-d2 | 73.0 MB | 0.1220 | 1.50 | 80.0 % |"
    assert lines[-1].startswith("| Q5_K_M (on the source's grid) | 112.0 MB | 0.0100 ")


def test_the_best_files_of_each_size_are_compared_without_those_on_the_grid() -> None:
    lines = whole_files.equal_sizes(RESULT).splitlines()
    assert lines[2:] == [
        "| 73.0 MB | balanced-d2 | 0.1220 | none |  |  |",
        "| 88.0 MB | balanced-d2 | 0.1220 | Q2_K | 0.7000 | 0.17 |",
        "| 97.0 MB | balanced-d3 | 0.0120 | Q2_K | 0.7000 | 0.02 |",
    ]


def test_our_file_of_a_size_has_depths_chosen_for_it(made: whole_files.WholeFiles, tmp_path: Path) -> None:
    whole = made.row("balanced-d4").file_bytes
    row = made.row(f"size-{0.9 * whole / 1e6}")
    assert 0.6 * whole < row.file_bytes <= 0.9 * whole


def test_chart() -> None:
    root = ElementTree.fromstring(whole_files.draw(RESULT))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for text in ("balanced", "published", "llama.cpp, imatrix", "llama.cpp, on the source's grid", "Q2_K", "Q5_K_M"):
        assert text in texts
    assert "small" not in texts
    assert {"70", "80", "90", "100", "110", "120"} <= set(texts)
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 1  # the two points of balanced
    dots = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == 5 + 4


def test_every_row_is_known_to_the_recipes() -> None:
    from tritgguf.conversion.recipes import RECIPES

    assert {name.partition("-d")[0] for name in whole_files.OURS} == set(RECIPES)

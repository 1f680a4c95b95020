"""The parts of tools/quality/compare_encoders.py: texts, llama.cpp's types, rows, table and chart."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from cpu_kernels.threads.thread_pool import ThreadPool
from tools.llama_cpp.ggml_types import GgmlQuantizer, bits_per_weight
from tools.quality import chart, compare_encoders, package_texts
from tritgguf.evaluation.divergence import Comparison
from tritgguf.formats import svg
from tritgguf.formats.gguf_file import GgufFile

RESULT: dict[str, Any] = {
    "model": "smollm2",
    "text": {"perplexity_fp16": 10.0},
    "rows": [
        {
            "name": name,
            "bpw": bpw,
            "kl_mean": kl,
            "kl_p99": 1.0,
            "perplexity": 11.0,
            "top1_agreement": 0.9,
            "seconds": 1,
        }
        for name, bpw, kl in [
            ("trit2-v2", 3.5, 0.6),
            ("trit3-v2", 5.25, 0.08),
            ("mixed-3.0", 3.0, 0.7),
            ("Q3_K", 3.44, 0.7),
            ("Q3_K-imatrix", 3.44, 0.4),
        ]
    ],
}


@pytest.mark.slow
def test_texts_are_disjoint() -> None:
    calibration, evaluation = package_texts.texts()
    assert min(len(calibration), len(evaluation)) > 200_000
    paragraphs = [{part.strip() for part in text.split("\n\n") if part.strip()} for text in (calibration, evaluation)]
    assert not paragraphs[0] & paragraphs[1]
    assert package_texts.texts() == (calibration, evaluation)


def test_windows(smollm2_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    text = "word " * 5000
    windows = package_texts.windows_of(text, tokenizer, 3)
    assert [len(window) for window in windows] == [512] * 3
    assert package_texts.fingerprint(windows) == package_texts.fingerprint(windows)
    assert package_texts.fingerprint(windows) != package_texts.fingerprint(windows[:2])


@pytest.mark.parametrize("type_name", compare_encoders.TYPES)
def test_llama_cpp_types(referee_library: Path, type_name: str) -> None:
    weights = np.random.default_rng(0).standard_normal((24, 192)).astype(np.float32)
    quantizer = GgmlQuantizer(referee_library, ThreadPool(2))
    found = quantizer.round_trip(weights, type_name)
    error = np.square(found - weights).mean() / np.square(weights).mean()
    assert 0 < error < 4.0 ** (1 - bits_per_weight(type_name)) * 4
    one = GgmlQuantizer(referee_library, ThreadPool(1)).round_trip(weights, type_name)
    np.testing.assert_array_equal(found, one)


def test_llama_cpp_and_gguf_py_agree(referee_library: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
    found = GgmlQuantizer(referee_library, ThreadPool(1)).round_trip(weights, "Q4_0")
    np.testing.assert_array_equal(found, expected)


def test_importance_of_llama_cpp_s_types(referee_library: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((8, 192)).astype(np.float32)
    importance = np.where(np.arange(192) % 2, 50, 1).astype(np.float32)
    quantizer = GgmlQuantizer(referee_library, ThreadPool(2))
    plain, weighted = quantizer.round_trip(weights, "Q3_K"), quantizer.round_trip(weights, "Q3_K", importance)
    errors = [np.square(found - weights)[:, 1::2].mean() for found in (plain, weighted)]
    assert errors[1] < errors[0]


def test_rows_that_do_not_fill_a_block(referee_library: Path) -> None:
    with pytest.raises(ValueError, match="do not make whole blocks"):
        GgmlQuantizer(referee_library, ThreadPool(1)).round_trip(np.ones((3, 192), np.float32), "Q3_K")


def test_every_row_has_a_name_that_is_understood() -> None:
    for name in compare_encoders.ROWS:
        kind, _, encoder = name.partition("-")
        is_ours = kind[:4] == "trit" and encoder in (*compare_encoders.ENCODERS, "tuned")
        assert is_ours or kind in ("mixed", *compare_encoders.TYPES)


def test_a_row_is_kept_as_soon_as_it_is_measured() -> None:
    class Fake(compare_encoders.Measurement):
        def __init__(self) -> None:
            pass

        def row(self, name: str) -> compare_encoders.Row:
            return compare_encoders.Row(name, 3.5, 0.5, 1.0, 12.0, 0.7, 1.0)

    kept: list[list[str]] = []
    result: dict[str, Any] = {"rows": [{"name": "Q3_K"}, {"name": "trit2-v2", "kl_mean": 9.0}]}
    compare_encoders.measure(
        Fake(), ["trit2-v2", "trit1-v2"], result, lambda state: kept.append([row["name"] for row in state["rows"]])
    )
    assert kept == [["trit2-v2", "Q3_K"], ["trit1-v2", "trit2-v2", "Q3_K"]]
    assert result["rows"][1]["kl_mean"] == 0.5


@pytest.mark.slow
def test_a_trit_row_is_measured_on_the_file(
    tmp_path: Path,
    smollm2_folder: Path,
    tiny_trit_file: Callable[..., GgufFile],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The arguments of `convert`, and that the file that it writes is compared."""
    asked: dict[str, Any] = {}
    loaded: list[int] = []
    measurement = compare_encoders.Measurement("smollm2", smollm2_folder.parent, None, tmp_path)
    file = tiny_trit_file("llama", 2)

    class Model:
        def load_file(self, file: GgufFile) -> None:
            loaded.append(len(file.tensors))

    def fake_convert(source: Path, output: Path, **settings: Any) -> None:
        asked.update(settings)
        shutil.copy(file.path, output)

    compared = Comparison(*(np.zeros(2) for _ in range(4)))
    monkeypatch.setattr(compare_encoders, "convert", fake_convert)
    monkeypatch.setattr(compare_encoders.Measurement, "_model", Model())
    monkeypatch.setattr(compare_encoders.Measurement, "_compare", lambda self: compared)
    row = measurement.row("trit2-calibrated")
    assert loaded == [len(file.tensors)]
    assert (asked["encoder"], asked["depth"]) == ("calibrated", 2)
    assert asked["windows"] == measurement.calibration
    assert (row.bpw, row.kl_mean) == (3.5, 0.0)
    asked.clear()
    assert measurement.row("trit2-calibrated").name == "trit2-calibrated"
    assert not asked, "a file that is there is made again"
    assert measurement.row("mixed-3.0").name == "mixed-3.0"
    assert asked["choice"].target_bpw == 3.0


def test_table() -> None:
    lines = compare_encoders.markdown(RESULT).splitlines()
    assert lines[2] == "| FP16 | 16 | 0 | 0 | 10.00 | 100 % |"
    assert lines[3] == "| trit2-v2 | 3.50 | 0.6000 | 1.00 | 11.00 | 90.0 % |"


def test_chart(tmp_path: Path) -> None:
    svg.write(tmp_path / "a.svg", chart.draw(RESULT))
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = [node.text for node in root.iter(f"{space}text")]
    assert {"v2", "mixed", "llama.cpp", "llama.cpp, imatrix", "Q3_K"} <= set(texts)
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in root.iter(f"{space}circle")]
    assert len(dots) == 5 + 4, "a dot for each row, and one for each entry of the legend"
    shallow, deep = dots[0], dots[1]
    assert shallow[0] < deep[0], "more bits are further right"
    assert shallow[1] < deep[1], "less divergence is further down"

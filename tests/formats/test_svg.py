"""The drawing class of all charts: well-formed SVG for any text, one style."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tritgguf.errors import TritGgufError
from tritgguf.formats.svg import Drawing, write

SVG = "{http://www.w3.org/2000/svg}"


def test_every_shape_and_text() -> None:
    drawing = Drawing(200, 100, "a <title> & more", "a subtitle", "  .own { fill: red }\n")
    drawing.text(3, 4.25, "1 < 2", kind="small", anchor="end")
    drawing.line(0, 1.0, 2, 3.06, kind="grid")
    drawing.bar(0, 0, 5, 5, kind="own")
    drawing.dot(1, 2, "blue")
    drawing.curve([(0, 1), (2.55, 3)], kind="own", color="blue")
    drawing.area([(0, 1), (2, 3), (4, 5)], kind="own")
    root = ElementTree.fromstring(str(drawing))
    assert root.get("viewBox") == "0 0 200 100"
    assert [element.text for element in root.findall(f"{SVG}text")] == ["a <title> & more", "a subtitle", "1 < 2"]
    assert root.findall(f"{SVG}text")[2].attrib == {"class": "small", "x": "3", "y": "4.2", "text-anchor": "end"}
    assert root.findall(f"{SVG}line")[0].attrib == {"class": "grid", "x1": "0", "y1": "1.0", "x2": "2", "y2": "3.1"}
    assert root.findall(f"{SVG}polyline")[0].get("points") == "0.0,1.0 2.5,3.0"
    assert [element.tag.removeprefix(SVG) for element in root[-5:]] == ["line", "rect", "circle", "polyline", "polygon"]
    style = root.findall(f"{SVG}style")[0].text or ""
    assert ".own { fill: red }" in style and "prefers-color-scheme: dark" in style


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TritGgufError, match="cannot be written"):
        write(tmp_path / "no folder" / "chart.svg", str(Drawing(1, 1, "", "")))

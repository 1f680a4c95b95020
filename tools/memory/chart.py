"""Charts of memory over time, one for each command."""

from __future__ import annotations

from typing import Any

from tritgguf.formats.svg import Drawing

_WIDTH, _LEFT, _GAP, _TOP = 820, 40, 44, 64  # units: width, left margin, gap between charts, top margin
_HEIGHT, _ROW = 96, 150  # of a chart without and with its title and axis
_COLUMNS = 2
_STYLE = """\
  .own { fill: #2f81c7; fill-opacity: 0.55; stroke: #2f81c7 }
"""


def draw(result: dict[str, Any]) -> str:
    """Return the chart of a result of `curve.py` as the text of an SVG file."""
    runs = [(shape, run) for shape, runs in result["shapes"].items() for run in runs]
    most = max([result["bound"], *(run["peak_own"] for _, run in runs)]) * 1.05
    drawing = Drawing(
        _WIDTH,
        _TOP + _ROW * -(-len(runs) // _COLUMNS),
        "Resident memory over time in GB, without pages of mapped files",
        f"{result['processor']}; the line is the limit, {result['bound'] / 1e9:g} GB",
        _STYLE,
    )
    width = (_WIDTH - _LEFT - 8 - (_COLUMNS - 1) * _GAP) / _COLUMNS
    for number, (shape, run) in enumerate(runs):
        row, column = divmod(number, _COLUMNS)
        place = (_LEFT + column * (width + _GAP), _TOP + row * _ROW + 16.0, width)
        _draw_run(drawing, f"{shape}: {run['name']}", run, result["bound"], most, place)
    return str(drawing)


def _draw_run(
    drawing: Drawing, title: str, run: dict[str, Any], bound: int, most: float, place: tuple[float, float, float]
) -> None:
    """Draw title, axes and area of one command's memory; `place` is left, top and width."""
    x, y, width = place
    bottom, seconds = y + _HEIGHT, max(run["seconds"], run["curve"][-1][0])

    def height_of(count: float) -> float:
        return bottom - _HEIGHT * count / most

    drawing.text(x, y - 6, title)
    for count in (0, 500_000_000, 1_000_000_000):
        drawing.line(x, height_of(count), x + width, height_of(count), kind="grid")
        drawing.text(x - 5, height_of(count) + 4, f"{count / 1e9:g}", kind="small", anchor="end")
    points = [(x + width * time / seconds, height_of(own)) for time, own, _ in run["curve"]]
    drawing.area([(x, bottom), *points, (x + width, points[-1][1]), (x + width, bottom)], kind="own")
    drawing.line(x, height_of(bound), x + width, height_of(bound), kind="bound")
    drawing.text(x, bottom + 14, f"peak {run['peak_own'] / 1e9:.2f} GB", kind="small")
    drawing.text(x + width, bottom + 14, f"{run['seconds']:.0f} s", kind="small", anchor="end")

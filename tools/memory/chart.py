"""Curves of memory over time as SVG, a small one for each command; readable on light and on dark ground."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from tools.speed.chart import STYLE
from tritgguf.formats.durable_output import disk_errors, write_text

_WIDTH, _LEFT, _GAP, _TOP = 820, 40, 44, 64  # of the whole, left of a row's first curve, between two, above the first
_HEIGHT, _ROW = 96, 150  # of a curve, of it with its title and axis
_COLUMNS = 2
_STYLE = """
  .own { fill: #2f81c7; fill-opacity: 0.55; stroke: #2f81c7 }
"""


def draw(result: dict[str, Any]) -> str:
    """Return the chart of a result of `curve.py` as the text of an SVG file."""
    runs = [(shape, run) for shape, runs in result["shapes"].items() for run in runs]
    rows = -(-len(runs) // _COLUMNS)
    height = _TOP + _ROW * rows
    most = max([result["bound"], *(run["peak_own"] for _, run in runs)]) * 1.05
    title = "Resident memory over time in GB, without pages of mapped files"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{_STYLE}</style>",
        f'<text class="title" x="8" y="20">{escape(title)}</text>',
        f'<text class="small" x="8" y="38">{escape(result["processor"])};'
        f" the line across is the most it may be, {result['bound'] / 1e9:g} GB</text>",
    ]
    width = (_WIDTH - _LEFT - 8 - (_COLUMNS - 1) * _GAP) / _COLUMNS
    for number, (shape, run) in enumerate(runs):
        row, column = divmod(number, _COLUMNS)
        x, y = _LEFT + column * (width + _GAP), _TOP + row * _ROW
        parts += _curve(f"{shape}: {run['name']}", run, result["bound"], most, (x, y + 16, width))
    return "\n".join([*parts, "</svg>", ""])


def _curve(title: str, run: dict[str, Any], bound: int, most: float, place: tuple[float, float, float]) -> list[str]:
    """Return title, axes and area of one command's memory; `place` is the left, the top and the width."""
    x, y, width = place
    bottom, seconds = y + _HEIGHT, max(run["seconds"], run["curve"][-1][0])

    def height_of(count: float) -> float:
        return bottom - _HEIGHT * count / most

    points = [(x + width * time / seconds, height_of(own)) for time, own, _ in run["curve"]]
    points = [(x, bottom), *points, (x + width, points[-1][1]), (x + width, bottom)]
    area = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
    return [
        f'<text x="{x:.1f}" y="{y - 6:.1f}">{escape(title)}</text>',
        *(
            part
            for count in (0, 500_000_000, 1_000_000_000)
            for part in (
                f'<line class="grid" x1="{x:.1f}" y1="{height_of(count):.1f}" x2="{x + width:.1f}"'
                f' y2="{height_of(count):.1f}"/>',
                f'<text class="small" x="{x - 5:.1f}" y="{height_of(count) + 4:.1f}" text-anchor="end">'
                f"{count / 1e9:g}</text>",
            )
        ),
        f'<polygon class="own" points="{area}"/>',
        f'<line class="bound" x1="{x:.1f}" y1="{height_of(bound):.1f}" x2="{x + width:.1f}"'
        f' y2="{height_of(bound):.1f}"/>',
        f'<text class="small" x="{x:.1f}" y="{bottom + 14:.1f}">peak {run["peak_own"] / 1e9:.2f} GB</text>',
        f'<text class="small" x="{x + width:.1f}" y="{bottom + 14:.1f}" text-anchor="end">'
        f"{run['seconds']:.0f} s</text>",
    ]


def write_chart(result: dict[str, Any], file: Path) -> None:
    """Write the chart of a result."""
    with disk_errors(file):
        write_text(file, draw(result))

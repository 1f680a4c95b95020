"""A bar chart of the ratios with their bounds."""

from __future__ import annotations

from typing import Any

from tools.speed.ratios import GOALS, verdict
from tritgguf.formats.svg import Drawing

_WIDTH, _LABELS, _RIGHT = 820, 350, 60  # units: width, space for labels, space for figures
_ROW, _BAR, _TOP, _FIGURE = 26, 14, 56, 40
_STYLE = """\
  .pass, .none { fill: #2f81c7 }
  .fail { fill: #d9822b }
"""


def draw(result: dict[str, Any]) -> str:
    """Return the chart of a result's ratios as the text of an SVG file."""
    ratios = result["ratios"]
    bounds = [GOALS[name].bound or 0.0 for name in ratios]
    longest = max([1.0, *ratios.values(), *bounds])
    scale = (_WIDTH - _LABELS - _RIGHT) / longest
    bottom = _TOP + _ROW * len(ratios)
    drawing = Drawing(
        _WIDTH,
        bottom + 24,
        f"Speed, ours over theirs: {result['shape']}, {result['threads']} threads",
        f"{result['absolute']['processor']}; the line across a bar is its lower bound, orange bars are below it",
        _STYLE,
    )
    for half in range(int(2 * longest) + 1):
        x = _LABELS + scale * half / 2
        drawing.line(x, _TOP - 6, x, bottom, kind="grid")
        drawing.text(x, bottom + 15, f"{half / 2:g}", kind="small", anchor="middle")
    for number, (name, ratio) in enumerate(ratios.items()):
        _draw_row(drawing, name, ratio, _TOP + _ROW * number, scale)
    return str(drawing)


def _draw_row(drawing: Drawing, name: str, ratio: float, y: int, scale: float) -> None:
    """Draw label, bar, figure and bound of one ratio, whose row begins at `y`."""
    goal, text_y = GOALS[name], y + _BAR - 3
    end = _LABELS + scale * ratio
    drawing.text(_LABELS - 8, text_y, goal.label, anchor="end")
    drawing.bar(_LABELS, y, end - _LABELS, _BAR, kind=verdict(name, ratio) or "none")
    if goal.bound is not None:
        x = _LABELS + scale * goal.bound
        drawing.line(x, y - 3, x, y + _BAR + 3, kind="bound")
        if end <= x < end + _FIGURE:
            end = x  # put the figure to the right of the mark, not under it
    drawing.text(end + 6, text_y, f"{ratio:.2f}")

"""Chart of KL over bits per weight, on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritgguf.formats.svg import Drawing

_WIDTH, _HEIGHT = 820, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 190, 56, 44
_COLORS = {
    "v2": "#9a9a9a",
    "best": "#8250df",
    "imatrix": "#2da44e",
    "calibrated": "#2f81c7",
    "self": "#1f6feb",
    "tuned": "#bf3989",
    "mixed": "#0a3069",
    "llama.cpp": "#d9822b",
    "llama.cpp, imatrix": "#a04a00",
}
_STYLE = """\
  .series { fill: none; stroke-width: 1.5; stroke-opacity: 0.7 }
"""
Place = Callable[[float, float], tuple[float, float]]
"""From a value of the horizontal axis and a KL to a point of the drawing."""


def draw(result: dict[str, Any]) -> str:
    """Return the chart of a result of `compare_encoders.py` as the text of an SVG file."""
    series = _series(result["rows"])
    points = {
        name: [Point(row["bpw"], row["kl_mean"], _type_of(row) if name.startswith("llama.cpp") else "") for row in rows]
        for name, rows in series.items()
    }
    return draw_points(f"KL to the FP16 model over bits per weight, {result['model']}", points, _COLORS, step=1)


@dataclass(frozen=True)
class Point:
    """A point of a chart: where it stands on the horizontal axis, its KL, and what is written beside it."""

    x: float
    kl: float
    label: str = ""


def draw_points(title: str, series: Mapping[str, Sequence[Point]], colors: Mapping[str, str], *, step: float) -> str:
    """Return a chart of series of points with vertical lines every `step`, as the text of an SVG file.

    Series whose points have no label are joined by a line.
    """
    everything = [point for points in series.values() for point in points]
    low = math.floor(min(point.x for point in everything) / step)
    high = max(low + 1, math.ceil(max(point.x for point in everything) / step))
    powers = [math.log10(point.kl) for point in everything]
    bottom, top = math.floor(min(powers)), math.ceil(max(powers))

    def place(x: float, kl: float) -> tuple[float, float]:
        share = (top - math.log10(kl)) / max(1, top - bottom)
        across = (x / step - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _TOP + share * (_HEIGHT - _TOP - _BOTTOM)

    drawing = Drawing(_WIDTH, _HEIGHT, title, "mean over all tokens, in nats, logarithmic: lower is better", _STYLE)
    _draw_grid(drawing, [number * step for number in range(low, high + 1)], range(bottom, top + 1), place)
    for number, (name, members) in enumerate(series.items()):
        members = sorted(members, key=lambda point: point.x)
        joined = not any(point.label for point in members)
        points = [place(point.x, point.kl) for point in members]
        _draw_series(drawing, name, colors[name], points, joined=joined, number=number)
        for point, (x, y) in zip(members, points, strict=True):
            if point.label:
                drawing.text(x + 7, y + 4, point.label, kind="small")
    return str(drawing)


def _type_of(row: dict[str, Any]) -> str:
    return str(row["name"].partition("-")[0])


def _series(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows by encoder, in the order of the legend."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kind, _, encoder = row["name"].partition("-")
        if kind == "mixed":
            name = "mixed"
        elif kind.startswith("trit"):
            name = encoder
        else:
            name = "llama.cpp, imatrix" if encoder else "llama.cpp"
        found.setdefault(name, []).append(row)
    return {name: found[name] for name in _COLORS if name in found}


def _draw_grid(drawing: Drawing, ticks: Sequence[float], powers: Sequence[int], place: Place) -> None:
    """Draw the grid lines and labels of both axes."""
    for tick in ticks:
        x, _ = place(tick, 1)
        drawing.line(x, _TOP, x, _HEIGHT - _BOTTOM, kind="grid")
        drawing.text(x, _HEIGHT - _BOTTOM + 16, f"{tick:g}", kind="small", anchor="middle")
    for power in powers:
        _, y = place(ticks[0], 10.0**power)
        drawing.line(_LEFT, y, _WIDTH - _RIGHT, y, kind="grid")
        drawing.text(_LEFT - 6, y + 4, f"{10.0**power:g}", kind="small", anchor="end")


def _draw_series(
    drawing: Drawing, series: str, color: str, points: Sequence[tuple[float, float]], *, joined: bool, number: int
) -> None:
    """Draw a series' dots, the line through them and its entry in the legend."""
    y = _TOP + 20 * number
    for x, top in points:
        drawing.dot(x, top, color)
    if joined and len(points) > 1:
        drawing.curve(points, kind="series", color=color)
    drawing.dot(_WIDTH - _RIGHT + 18, y - 4, color)
    drawing.text(_WIDTH - _RIGHT + 28, y, series)

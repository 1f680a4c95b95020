"""Chart of KL over bits per weight, on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tools.svg import Drawing

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
"""From bits per weight and KL to a point of the drawing."""


def draw(result: dict[str, Any]) -> str:
    """Return the chart of a result of `compare_encoders.py` as the text of an SVG file."""
    rows = result["rows"]
    bits = [row["bpw"] for row in rows]
    low, high = (math.floor(min(bits)), math.ceil(max(bits)))
    powers = [math.log10(row["kl_mean"]) for row in rows]
    bottom, top = math.floor(min(powers)), math.ceil(max(powers))

    def place(bits: float, kl: float) -> tuple[float, float]:
        x = _LEFT + (bits - low) / max(1, high - low) * (_WIDTH - _LEFT - _RIGHT)
        share = (top - math.log10(kl)) / max(1, top - bottom)
        return x, _TOP + share * (_HEIGHT - _TOP - _BOTTOM)

    drawing = Drawing(
        _WIDTH,
        _HEIGHT,
        f"KL to the FP16 model over bits per weight, {result['model']}",
        "mean over all tokens, in nats, logarithmic: lower is better",
        _STYLE,
    )
    _draw_grid(drawing, range(low, high + 1), range(bottom, top + 1), place)
    for number, (series, members) in enumerate(_series(rows).items()):
        points = [place(row["bpw"], row["kl_mean"]) for row in sorted(members, key=lambda row: row["bpw"])]
        _draw_series(drawing, series, points, joined=not series.startswith("llama.cpp"), number=number)
        if series.startswith("llama.cpp"):
            for row in members:
                x, y = place(row["bpw"], row["kl_mean"])
                drawing.text(x + 7, y + 4, row["name"].partition("-")[0], kind="small")
    return str(drawing)


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


def _draw_grid(drawing: Drawing, bits: Sequence[int], powers: Sequence[int], place: Place) -> None:
    """Draw the grid lines and labels of both axes."""
    for bit in bits:
        x, _ = place(bit, 1)
        drawing.line(x, _TOP, x, _HEIGHT - _BOTTOM, kind="grid")
        drawing.text(x, _HEIGHT - _BOTTOM + 16, str(bit), kind="small", anchor="middle")
    for power in powers:
        _, y = place(bits[0], 10.0**power)
        drawing.line(_LEFT, y, _WIDTH - _RIGHT, y, kind="grid")
        drawing.text(_LEFT - 6, y + 4, f"{10.0**power:g}", kind="small", anchor="end")


def _draw_series(
    drawing: Drawing, series: str, points: Sequence[tuple[float, float]], *, joined: bool, number: int
) -> None:
    """Draw a series' dots, the line through them and its entry in the legend."""
    color, y = _COLORS[series], _TOP + 20 * number
    for x, top in points:
        drawing.dot(x, top, color)
    if joined and len(points) > 1:
        drawing.curve(points, kind="series", color=color)
    drawing.dot(_WIDTH - _RIGHT + 18, y - 4, color)
    drawing.text(_WIDTH - _RIGHT + 28, y, series)

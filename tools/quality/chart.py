"""KL over bits per weight as SVG, on a logarithmic scale; readable on light and on dark ground."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tools.speed.chart import STYLE
from tritgguf.formats.durable_output import disk_errors, write_text

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
_STYLE = """
  .series { fill: none; stroke-width: 1.5; stroke-opacity: 0.7 }
"""


def draw(result: dict[str, Any]) -> str:
    """Return the chart of a result of `compare_encoders.py` as the text of an SVG file."""
    rows = result["rows"]
    bits = [row["bpw"] for row in rows]
    low, high = (math.floor(min(bits)), math.ceil(max(bits)))
    powers = [math.log10(row["kl_mean"]) for row in rows]
    bottom, top = math.floor(min(powers)), math.ceil(max(powers))

    def place(row: dict[str, Any]) -> tuple[float, float]:
        x = _LEFT + (row["bpw"] - low) / max(1, high - low) * (_WIDTH - _LEFT - _RIGHT)
        share = (top - math.log10(row["kl_mean"])) / max(1, top - bottom)
        return x, _TOP + share * (_HEIGHT - _TOP - _BOTTOM)

    title = f"KL to the FP16 model over bits per weight, {result['model']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{_STYLE}</style>",
        f'<text class="title" x="8" y="20">{escape(title)}</text>',
        '<text class="small" x="8" y="38">mean over all tokens, in nats, logarithmic: lower is better</text>',
        *_grid(range(low, high + 1), range(bottom, top + 1), place),
    ]
    for number, (series, members) in enumerate(_series(rows).items()):
        points = [place(row) for row in sorted(members, key=lambda row: row["bpw"])]
        parts += _curve(series, points, joined=not series.startswith("llama.cpp"), number=number)
        if series.startswith("llama.cpp"):
            parts += [_label(row["name"].partition("-")[0], *place(row)) for row in members]
    return "\n".join([*parts, "</svg>", ""])


def _series(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows by what made them, in the order of the legend."""
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


def _grid(bits: Sequence[int], powers: Sequence[int], place: Any) -> list[str]:
    """Return the lines and figures of both axes."""
    parts = []
    for bit in bits:
        x, _ = place({"bpw": bit, "kl_mean": 1})
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="small" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{bit}</text>')
    for power in powers:
        _, y = place({"bpw": bits[0], "kl_mean": 10.0**power})
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="small" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    return parts


def _curve(series: str, points: Sequence[tuple[float, float]], *, joined: bool, number: int) -> list[str]:
    """Return a series' dots, the line through them and its entry in the legend."""
    color = _COLORS[series]
    y = _TOP + 20 * number
    parts = [f'<circle cx="{x:.1f}" cy="{top:.1f}" r="4" fill="{color}"/>' for x, top in points]
    if joined and len(points) > 1:
        path = " ".join(f"{x:.1f},{top:.1f}" for x, top in points)
        parts.append(f'<polyline class="series" stroke="{color}" points="{path}"/>')
    parts.append(f'<circle cx="{_WIDTH - _RIGHT + 18}" cy="{y - 4}" r="4" fill="{color}"/>')
    parts.append(f'<text x="{_WIDTH - _RIGHT + 28}" y="{y}">{escape(series)}</text>')
    return parts


def _label(text: str, x: float, y: float) -> str:
    return f'<text class="small" x="{x + 7:.1f}" y="{y + 4:.1f}">{escape(text)}</text>'


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the chart."""
    with disk_errors(path):
        write_text(path, draw(result))

"""A bar chart of the ratios as SVG, with every bound marked; readable on light and on dark ground."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from tools.speed.ratios import GOALS, verdict
from tritgguf.formats.durable_output import disk_errors, write_text

_WIDTH, _LABELS, _RIGHT = 820, 350, 60  # of the whole, of the labels left and of the figures right of the bars
_ROW, _BAR, _TOP, _FIGURE = 26, 14, 56, 40
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .title { font-weight: 600 }
  .small { font-size: 11px; fill: #57606a }
  .grid { stroke: #8b949e; stroke-opacity: 0.35 }
  .bound { stroke: #24292f; stroke-width: 2 }
  .pass, .none { fill: #2f81c7 }
  .fail { fill: #d9822b }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .small { fill: #9da7b1 }
    .bound { stroke: #e6edf3 }
  }
"""


def draw(result: dict[str, Any]) -> str:
    """Return the chart of a result's ratios as the text of an SVG file."""
    ratios = result["ratios"]
    bounds = [GOALS[name].bound or 0.0 for name in ratios]
    longest = max([1.0, *ratios.values(), *bounds])
    scale = (_WIDTH - _LABELS - _RIGHT) / longest
    bottom = _TOP + _ROW * len(ratios)
    title = f"Speed, ours over theirs: {result['shape']}, {result['threads']} threads"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 24}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<text class="title" x="8" y="20">{escape(title)}</text>',
        f'<text class="small" x="8" y="38">{escape(result["absolute"]["processor"])};'
        " a line across a bar is the least it has to reach, orange falls short of it</text>",
    ]
    for half in range(int(2 * longest) + 1):
        x = _LABELS + scale * half / 2
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="small" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{half / 2:g}</text>')
    for number, (name, ratio) in enumerate(ratios.items()):
        parts += _row(name, ratio, _TOP + _ROW * number, scale)
    return "\n".join([*parts, "</svg>", ""])


def _row(name: str, ratio: float, y: float, scale: float) -> list[str]:
    """Return label, bar, figure and the bound's mark of one ratio, whose row begins at `y`."""
    goal, text_y = GOALS[name], y + _BAR - 3
    end = _LABELS + scale * ratio
    kind = verdict(name, ratio) or "none"
    parts = [
        f'<text x="{_LABELS - 8}" y="{text_y}" text-anchor="end">{escape(goal.label)}</text>',
        f'<rect class="{kind}" x="{_LABELS}" y="{y}" width="{end - _LABELS:.1f}" height="{_BAR}" rx="2"/>',
    ]
    if goal.bound is not None:
        x = _LABELS + scale * goal.bound
        parts.append(f'<line class="bound" x1="{x:.1f}" y1="{y - 3}" x2="{x:.1f}" y2="{y + _BAR + 3}"/>')
        if end <= x < end + _FIGURE:
            end = x  # the figure stands behind the mark, not under it
    return [*parts, f'<text x="{end + 6:.1f}" y="{text_y}">{ratio:.2f}</text>']


def write_chart(result: dict[str, Any], file: Path) -> None:
    """Write the chart of a result."""
    with disk_errors(file):
        write_text(file, draw(result))

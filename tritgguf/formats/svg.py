"""Charts as SVG, in one style that is readable in light and dark mode."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from tritgguf.formats.durable_output import disk_errors, write_text

_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .title { font-weight: 600 }
  .small { font-size: 11px; fill: #57606a }
  .grid { stroke: #8b949e; stroke-opacity: 0.35 }
  .bound { stroke: #24292f; stroke-width: 2 }
%s  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .small { fill: #9da7b1 }
    .bound { stroke: #e6edf3 }
  }
"""


class Drawing:
    """An SVG image with a title and a subtitle, which take the top 40 units.

    Positions are in the units of `width` and `height`, from the top left corner. Integers are written as they are,
    floats with one decimal. `style` adds CSS rules for the classes of one chart, one per line. Every chart has the
    classes `small` for text, and `grid` and `bound` for lines.
    """

    def __init__(self, width: int, height: int, title: str, subtitle: str, style: str = "") -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE % style}</style>",
        ]
        self.text(8, 20, title, kind="title")
        self.text(8, 38, subtitle, kind="small")

    def text(self, x: float, y: float, text: str, *, kind: str = "", anchor: str = "") -> None:
        """Write a text whose baseline begins at a point; with `anchor`, the point is its `middle` or `end`."""
        self._add("text", {"class": kind, "x": x, "y": y, "text-anchor": anchor}, text)

    def line(self, x1: float, y1: float, x2: float, y2: float, *, kind: str) -> None:
        """Draw a line between two points."""
        self._add("line", {"class": kind, "x1": x1, "y1": y1, "x2": x2, "y2": y2})

    def bar(self, x: float, y: float, width: float, height: float, *, kind: str) -> None:
        """Draw a filled rectangle with slightly rounded corners."""
        self._add("rect", {"class": kind, "x": x, "y": y, "width": width, "height": height, "rx": 2})

    def dot(self, x: float, y: float, color: str) -> None:
        """Draw a point."""
        self._add("circle", {"cx": x, "cy": y, "r": 4, "fill": color})

    def curve(self, points: Iterable[tuple[float, float]], *, kind: str, color: str) -> None:
        """Join points by straight lines."""
        self._add("polyline", {"class": kind, "stroke": color, "points": _points(points)})

    def area(self, points: Iterable[tuple[float, float]], *, kind: str) -> None:
        """Fill the polygon with these corners."""
        self._add("polygon", {"class": kind, "points": _points(points)})

    def _add(self, element: str, attributes: dict[str, str | float], text: str = "") -> None:
        """Add an element; empty attributes are left out."""
        given = "".join(f' {name}="{_number(value)}"' for name, value in attributes.items() if value != "")
        self._parts.append(f"<{element}{given}>{escape(text)}</{element}>" if text else f"<{element}{given}/>")

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _number(value: str | float) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def write(file: Path, drawing: str) -> None:
    """Write an SVG file; raises TritGgufError if writing fails."""
    with disk_errors(file):
        write_text(file, drawing)

"""A chart of compared files: divergence over size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tritgguf.errors import TritGgufError
from tritgguf.evaluation.quantization_costs import FileQuality
from tritgguf.formats.svg import Drawing

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 74, 48
_COLOR = "#0969da"
_MARGIN = 0.12  # of an axis, beyond the outermost points


def chart(title: str, subtitle: str, files: Sequence[FileQuality]) -> str:
    """Return an SVG with a point for each file: size in GB to the right, mean KL divergence upwards, logarithmic.

    Files without a divergence, such as the reference itself, are left out. Raises TritGgufError if none is left.
    """
    shown = sorted((file for file in files if file.kl_mean > 0), key=lambda file: file.file_bytes)
    if not shown:
        raise TritGgufError("there is nothing to plot: no file differs from the reference")
    drawing = Drawing(_WIDTH, _HEIGHT, title, subtitle)
    sizes = _Axis([file.file_bytes / 1e9 for file in shown], _LEFT, _WIDTH - _RIGHT)
    losses = _Axis([math.log10(file.kl_mean) for file in shown], _HEIGHT - _BOTTOM, _TOP)
    _draw_axes(drawing, sizes, losses)
    above = 1e9
    for file in shown:
        x, y = sizes.place(file.file_bytes / 1e9), losses.place(math.log10(file.kl_mean))
        drawing.dot(x, y, _COLOR)
        to_the_left = x > _WIDTH / 2
        shift = 14 if abs(y - above) < 12 else 4  # below the name of a point that is as high
        drawing.text(x + (-8 if to_the_left else 8), y + shift, file.file.stem, anchor="end" if to_the_left else "")
        above = y
    return str(drawing)


class _Axis:
    """Places values between two positions, with a margin around the outermost ones."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        low, high = min(values), max(values)
        margin = (high - low) * _MARGIN or abs(high) * _MARGIN or 1.0
        self.low, self.high, self._first, self._last = low - margin, high + margin, first, last

    def place(self, value: float) -> float:
        return self._first + (value - self.low) / (self.high - self.low) * (self._last - self._first)

    def round_values(self) -> list[float]:
        """Return three to seven round values on the axis."""
        step = 10 ** math.floor(math.log10(self.high - self.low))
        step = next(part * step for part in (1, 0.5, 0.2, 0.1) if (self.high - self.low) / (part * step) >= 3)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)]


def _draw_axes(drawing: Drawing, sizes: _Axis, losses: _Axis) -> None:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for size in sizes.round_values():
        if size >= 0:
            drawing.line(sizes.place(size), _TOP, sizes.place(size), bottom, kind="grid")
            drawing.text(sizes.place(size), bottom + 16, f"{size:.4g}", kind="small", anchor="middle")
    for exponent in losses.round_values():
        drawing.line(_LEFT, losses.place(exponent), right, losses.place(exponent), kind="grid")
        drawing.text(_LEFT - 6, losses.place(exponent) + 4, f"{10**exponent:.2g}", kind="small", anchor="end")
    drawing.text((_LEFT + right) / 2, _HEIGHT - 10, "size in GB", kind="small", anchor="middle")
    drawing.text(_LEFT, _TOP - 8, "KL divergence, mean", kind="small")

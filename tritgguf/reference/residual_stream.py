"""Where the residual stream of a decoder block can be observed."""

from __future__ import annotations

from typing import NamedTuple


class ResidualStream(NamedTuple):
    """The stream around a matrix whose product is added to it.

    Attributes:
        before: GGUF name of the norm whose input it is before the addition; None for the block's input.
        after: that of the norm whose input it is afterwards; None for the block's output.

    """

    before: str | None
    after: str | None

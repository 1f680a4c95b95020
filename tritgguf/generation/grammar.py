"""Constraints on the tokens of an answer, so that it follows a grammar."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class TokenConstraint(Protocol):
    """Says which tokens may come next in one answer."""

    def allowed(self) -> np.ndarray:
        """Return which tokens may come next: bool [vocabulary], not to be changed."""

    def accept(self, token: int) -> None:
        """Take note of the next token of the answer, one of those allowed."""

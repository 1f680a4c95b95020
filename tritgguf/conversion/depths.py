"""Choose the depth of each matrix: by name pattern, by a sensitivity threshold, or by a budget of bits.

A depth's cost is additive over matrices: the error of the block's output (`calibration.sensitivity`) for a threshold,
the divergence of the model's predictions (`calibration.divergence_costs`) for a budget. This module does not depend on
how it is measured.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tritgguf.conversion.recipes import Recipe
from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types

Costs = Mapping[str, Mapping[int, float]]
"""GGUF name -> depth -> cost of the matrix's error at this depth."""
Measure = Callable[[list[str], Sequence[int]], Costs]
"""Returns the costs of the named matrices at some depths."""

F16_DEPTH = 0
_DEFAULT_DEPTH = 2
_BISECTION_STEPS = 200
_ROUNDING = 1e-9  # of a budget, relative


@dataclass(frozen=True)
class KeepRule:
    """Sets the depth of matrices whose names match a pattern; 0 means F16."""

    pattern: str
    depth: int

    def matches(self, name: str) -> bool:
        """Return whether a tensor's name matches: `*` is a wildcard, and `.weight` may be omitted."""
        return any(fnmatch.fnmatchcase(text, self.pattern) for text in (name, name.removesuffix(".weight")))


class MeasuredCosts:
    """Costs that were measured for one choice, and that other conversions of the same source need again.

    To be shared only by conversions that measure on the same text.

    Args:
        thresholds: those of all these conversions (`DepthChoice.sensitivity`).

    """

    def __init__(self, thresholds: Iterable[float] = ()) -> None:
        self.thresholds = tuple(sorted(set(thresholds)))
        self._costs: dict[tuple[str, tuple[str, ...], tuple[int, ...]], Costs] = {}

    def of(self, kind: str, names: list[str], some_depths: Sequence[int], measure: Measure) -> Costs:
        """Return the costs of the named matrices at some depths; `measure` is called for what is not known yet.

        `kind` tells costs apart that are measured in different ways.
        """
        key = (kind, tuple(names), tuple(some_depths))
        if key not in self._costs:
            self._costs[key] = measure(names, some_depths)
        return self._costs[key]


@dataclass(frozen=True)
class DepthChoice:
    """Options that choose depths of single matrices; raises TritGgufError if they contradict each other.

    keep: rules that set depths by name.
    target_bpw: average bits per weight over the packed matrices in the file, reached by choosing the other depths.
    target_bytes: size of the whole file at most, reached by choosing the other depths.
    sensitivity: a matrix without a rule loses a trit if its sensitivity is then below this threshold.
    known: costs that conversions of one source share; None: they are measured.
    """

    keep: tuple[KeepRule, ...] = ()
    target_bpw: float | None = None
    sensitivity: float | None = None
    target_bytes: int | None = None
    known: MeasuredCosts | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        options = {"bpw": self.target_bpw, "size": self.target_bytes, "sensitivity": self.sensitivity}
        given = [name for name, value in options.items() if value is not None]
        if len(given) > 1:
            first, second = ("--sensitivity" if name == "sensitivity" else f"--target-{name}" for name in given[:2])
            raise TritGgufError(f"{first} and {second} both choose depths; give one of them")
        if self.target_bpw is not None and not bits_per_weight(1) <= self.target_bpw <= bits_per_weight(4):
            raise TritGgufError(
                f"--target-bpw {self.target_bpw}: it must be from {bits_per_weight(1)} to {bits_per_weight(4)}"
            )
        if self.sensitivity is not None and not 0 <= self.sensitivity < np.inf:
            raise TritGgufError(f"--sensitivity {self.sensitivity}: it must be 0 or more")

    @property
    def has_target(self) -> bool:
        """Whether depths are chosen to reach a size."""
        return self.target_bpw is not None or self.target_bytes is not None

    @property
    def needs_text(self) -> bool:
        """Whether costs have to be measured."""
        return self.has_target or self.sensitivity is not None

    def describe(self, depth: int) -> str:
        """Describe the choice for the file's metadata; empty if all depths are the same."""
        if self == NO_CHOICE:
            return ""
        parts = [f"{rule.pattern}={rule.depth}" for rule in self.keep]
        if self.target_bpw is not None:
            parts.append(f"target {self.target_bpw} bits per weight")
        elif self.target_bytes is not None:
            parts.append(f"target {self.target_bytes} bytes")
        elif self.sensitivity is not None:
            parts.append(f"depth {depth}, {depth - 1} below sensitivity {self.sensitivity}")
        else:
            parts.append(f"depth {depth}")
        return ", ".join(parts)

    def depths(
        self,
        weights: Mapping[str, int],
        kept: Mapping[str, int],
        depth: int,
        measure: Measure,
        other_bytes: Callable[[], int],
    ) -> dict[str, int]:
        """Return the depths of matrices: GGUF name -> trits per weight, 0 for F16.

        Args:
            weights: GGUF name -> number of weights, of the matrices whose depth is to be chosen.
            kept: GGUF name -> the depth that the rules set (`apply_rules`); names without weights are ignored.
            depth: the default depth.
            measure: returns the costs of the named matrices at some depths.
            other_bytes: returns the size of everything in the file but these matrices.

        """
        kept = {name: kept[name] for name in weights if name in kept}
        free = [name for name in weights if name not in kept]
        if self.has_target:
            budget = self._budget(free, kept, weights, other_bytes)
            chosen = depths_within_budget(measure(free, trit_types.DEPTHS), weights, budget)
        elif self.sensitivity is not None:
            if depth == 1:
                raise TritGgufError(
                    "--sensitivity removes a trit, but depth 1 has no trit to remove; give a greater --depth"
                )
            chosen = depths_below_threshold(measure(free, [depth - 1]), self.sensitivity, depth)
        else:
            chosen = dict.fromkeys(free, depth)
        return {name: chosen[name] if name in chosen else kept[name] for name in weights}

    def _budget(
        self,
        free: Sequence[str],
        kept: Mapping[str, int],
        weights: Mapping[str, int],
        other_bytes: Callable[[], int],
    ) -> float:
        """Return the bits that the target leaves for matrices without a rule; TritGgufError if they need more."""
        least = _bits(dict.fromkeys(free, min(trit_types.DEPTHS)), weights)
        if self.target_bpw is not None:
            packed = {name: depth for name, depth in kept.items() if depth != F16_DEPTH}
            fixed, total = _bits(packed, weights), sum(weights[name] for name in [*free, *packed])
            budget = self.target_bpw * total - fixed
            if least > budget * (1 + _ROUNDING):
                needed = f"{(fixed + least) / total:.3f} bits per weight"
                raise TritGgufError(f"--target-bpw {self.target_bpw}: with these options it is {needed} at least")
            return budget
        assert self.target_bytes is not None
        fixed = 8.0 * other_bytes() + _bits(kept, weights)
        budget = 8.0 * self.target_bytes - fixed
        if least > budget * (1 + _ROUNDING):
            needed = f"{math.ceil((fixed + least) / 8)} bytes"
            raise TritGgufError(f"--target-size {self.target_bytes}: with these options the file has {needed} at least")
        return budget


NO_CHOICE = DepthChoice()


@dataclass(frozen=True)
class DepthOptions:
    """The depths that the caller of `convert` requests; raises TritGgufError for depths that do not exist.

    depth: trits per weight of the layers' matrices; None means 2, or any depth for recovered matrices.
    output_depth, embedding_depth: depths of the output head and the embeddings, 0 for F16; None means the recipe's.
    choice: depths of single matrices in the layers.
    recipe: depths of the output head and the embeddings; None means the default recipe, and types that lose nothing
        where the source holds trits.
    """

    depth: int | None = None
    output_depth: int | None = None
    embedding_depth: int | None = None
    choice: DepthChoice = NO_CHOICE
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.depth not in (None, *trit_types.DEPTHS):
            raise TritGgufError(f"depth {self.depth} does not exist; choose 1, 2, 3 or 4")
        for what, value in (("output", self.output_depth), ("embedding", self.embedding_depth)):
            if value not in (None, F16_DEPTH, *trit_types.DEPTHS):
                raise TritGgufError(f"{what} depth {value} does not exist; choose 1, 2, 3 or 4, or 0 for F16")

    @property
    def layer_depth(self) -> int:
        """Default depth of quantized matrices in the layers."""
        return self.depth or _DEFAULT_DEPTH

    @property
    def max_recovered_depth(self) -> int:
        """Maximum depth of recovered matrices."""
        return self.depth or max(trit_types.DEPTHS)


def parse_rules(text: str) -> list[KeepRule]:
    """Parse the rules of `--keep`, `PATTERN=DEPTH` separated by commas; TritGgufError for anything else."""
    rules = []
    for part in text.split(","):
        pattern, equals, depth = part.strip().rpartition("=")
        if not equals or not pattern or depth not in ("0", "1", "2", "3", "4"):
            raise TritGgufError(
                f"--keep {part.strip() or text!r}: give PATTERN=DEPTH with a depth from 0 (F16) to 4, such as"
                " 'blk.0.*=3,*.ffn_down=3'"
            )
        rules.append(KeepRule(pattern, int(depth)))
    return rules


def apply_rules(names: Iterable[str], rules: Sequence[KeepRule]) -> dict[str, int]:
    """Return the depths that rules set for some of the names; the first matching rule applies.

    Raises TritGgufError for a rule that no name matches.
    """
    names = list(names)
    for rule in rules:
        if not any(rule.matches(name) for name in names):
            raise TritGgufError(
                f"--keep {rule.pattern}={rule.depth}: no matrix has such a name (names look like {names[0]})"
                if names
                else f"--keep {rule.pattern}={rule.depth}: the model has no matrix to pack"
            )
    chosen = {}
    for name in names:
        matching = [rule.depth for rule in rules if rule.matches(name)]
        if matching:
            chosen[name] = matching[0]
    return chosen


def depths_below_threshold(costs_of: Costs, threshold: float, depth: int) -> dict[str, int]:
    """Return `depth - 1` for every matrix whose sensitivity at `depth - 1` is below the threshold, else `depth`."""
    return {name: depth - 1 if costs[depth - 1] < threshold else depth for name, costs in costs_of.items()}


def depths_within_budget(costs_of: Costs, weights: Mapping[str, int], budget: float) -> dict[str, int]:
    """Return the depths of minimal total cost within a budget of bits.

    A Lagrange multiplier is the price of a bit: each matrix takes the depth that minimizes its cost plus the price of
    its bits. Bisection finds the lowest price within the budget, and leftover bits go to the matrices with the greatest
    gain per bit. The result is optimal on the convex hull of all choices.

    Args:
        costs_of: costs of the matrices; their depths are those that may be chosen.
        weights: GGUF name -> number of weights, of these matrices at least.
        budget: bits of all of them in the file, enough for their smallest depths.

    """

    def depths_at_price(price: float) -> dict[str, int]:
        return {
            name: min(costs, key=lambda depth: costs[depth] + price * weights[name] * bits_per_weight(depth))
            for name, costs in costs_of.items()
        }

    smallest = {name: min(costs, key=bits_per_weight) for name, costs in costs_of.items()}
    assert _bits(smallest, weights) <= budget * (1 + _ROUNDING)
    low, high = 0.0, 1.0
    while _bits(depths_at_price(high), weights) > budget * (1 + _ROUNDING):
        high *= 2
    if _bits(depths_at_price(low), weights) > budget:
        for _ in range(_BISECTION_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if _bits(depths_at_price(middle), weights) > budget else (low, middle)
    else:
        high = low
    depths = depths_at_price(high)
    _spend_leftover(depths, budget - _bits(depths, weights), costs_of, weights)
    return depths


def _spend_leftover(depths: dict[str, int], bits: float, costs_of: Costs, weights: Mapping[str, int]) -> None:
    """Move one matrix at a time to its next larger type, by the greatest gain per bit, until no step fits `bits`."""
    while True:
        gains = []
        for name, depth in depths.items():
            larger = [other for other in costs_of[name] if bits_per_weight(other) > bits_per_weight(depth)]
            if larger:
                step = min(larger, key=bits_per_weight)
                price = weights[name] * (bits_per_weight(step) - bits_per_weight(depth))
                gain = costs_of[name][depth] - costs_of[name][step]
                if price <= bits and gain > 0:
                    gains.append((gain / price, name, step, price))
        if not gains:
            return
        _, name, step, price = max(gains)
        depths[name] = step
        bits -= price


def _bits(depths: Mapping[str, int], weights: Mapping[str, int]) -> float:
    """Return the bits in the file of matrices at some depths."""
    return sum(weights[name] * bits_per_weight(depth) for name, depth in depths.items())


def bits_per_weight(depth: int) -> float:
    """Return the bits per weight in the file at a depth; 0 means F16."""
    if depth == F16_DEPTH:
        return 16.0
    return 8 * trit_types.row_bytes(depth, trit_types.BLOCK_SIZE) / trit_types.BLOCK_SIZE

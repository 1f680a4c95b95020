"""Which matrix gets how many trits: by pattern, by a threshold, or by a budget of bits.

A sensitivity says what a depth costs: GGUF name -> depth -> a number that adds up over matrices, such as the error of
the block's output (`sensitivity`). Nothing here knows where it comes from.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types

Sensitivities = Mapping[str, Mapping[int, float]]
"""GGUF name -> depth -> what the matrix's error at this depth costs."""

F16_DEPTH = 0
_DEFAULT_DEPTH = 2
_HALVINGS = 200


@dataclass(frozen=True)
class KeepRule:
    """Matrices whose names match a pattern have this depth; 0 keeps them in F16."""

    pattern: str
    depth: int

    def matches(self, name: str) -> bool:
        """Tell whether the rule is about a tensor: `*` stands for any letters, and `.weight` may be left away."""
        return any(fnmatch.fnmatchcase(text, self.pattern) for text in (name, name.removesuffix(".weight")))


@dataclass(frozen=True)
class DepthChoice:
    """What is to be decided about the depths of single matrices; raises TritGgufError for what contradicts itself.

    keep: matrices whose depth is given.
    target_bpw: average bits per weight of the packed matrices in the file, to be met by all the others.
    sensitivity: threshold below which one of the others loses a trit.
    """

    keep: tuple[KeepRule, ...] = ()
    target_bpw: float | None = None
    sensitivity: float | None = None

    def __post_init__(self) -> None:
        if self.target_bpw is not None and self.sensitivity is not None:
            raise TritGgufError("--target-bpw and --sensitivity both choose depths; give one of them")
        if self.target_bpw is not None and not bits_per_weight(1) <= self.target_bpw <= bits_per_weight(4):
            raise TritGgufError(
                f"--target-bpw {self.target_bpw}: it must be from {bits_per_weight(1)} to {bits_per_weight(4)}"
            )
        if self.sensitivity is not None and not 0 <= self.sensitivity < np.inf:
            raise TritGgufError(f"--sensitivity {self.sensitivity}: it must be 0 or more")

    @property
    def needs_text(self) -> bool:
        """Whether sensitivities have to be measured."""
        return self.target_bpw is not None or self.sensitivity is not None

    def describe(self, depth: int) -> str:
        """Return the choice in words, for the file's metadata; nothing where all depths are the same."""
        if self == NO_CHOICE:
            return ""
        parts = [f"{rule.pattern}={rule.depth}" for rule in self.keep]
        if self.target_bpw is not None:
            parts.append(f"target {self.target_bpw} bits per weight")
        elif self.sensitivity is not None:
            parts.append(f"depth {depth}, {depth - 1} below sensitivity {self.sensitivity}")
        else:
            parts.append(f"depth {depth}")
        return ", ".join(parts)

    def depths(
        self, weights: Mapping[str, int], depth: int, measure: Callable[[list[str], Sequence[int]], Sensitivities]
    ) -> dict[str, int]:
        """Return the depths of matrices: GGUF name -> trits per weight, 0 for F16.

        Args:
            weights: GGUF name -> number of weights, of the matrices to decide about.
            depth: of those that nothing else is said of.
            measure: returns the sensitivities of the named matrices at some depths.

        """
        kept = apply_rules(weights, self.keep)
        free = [name for name in weights if name not in kept]
        if self.target_bpw is not None:
            packed = {name: kept_depth for name, kept_depth in kept.items() if kept_depth != F16_DEPTH}
            chosen = depths_within(measure(free, trit_types.DEPTHS), weights, self.target_bpw, packed)
        elif self.sensitivity is not None:
            if depth == 1:
                raise TritGgufError(
                    "--sensitivity takes a trit away, which depth 1 cannot spare; give a greater --depth"
                )
            chosen = depths_below_threshold(measure(free, [depth - 1]), self.sensitivity, depth)
        else:
            chosen = dict.fromkeys(free, depth)
        return {name: chosen[name] if name in chosen else kept[name] for name in weights}


NO_CHOICE = DepthChoice()


@dataclass(frozen=True)
class DepthOptions:
    """The depths that a caller of `convert` wants; raises TritGgufError for depths that do not exist.

    depth: trits per weight of the layers' matrices; None for 2, or for any where a matrix is recovered.
    output_depth, embedding_depth: of the output head and of the embeddings, 0 for F16; None for what the source has.
    choice: which matrices of the layers have another depth.
    """

    depth: int | None = None
    output_depth: int | None = None
    embedding_depth: int | None = None
    choice: DepthChoice = NO_CHOICE

    def __post_init__(self) -> None:
        if self.depth not in (None, *trit_types.DEPTHS):
            raise TritGgufError(f"depth {self.depth} does not exist; choose 1, 2, 3 or 4")
        for what, value in (("output", self.output_depth), ("embedding", self.embedding_depth)):
            if value not in (None, F16_DEPTH, *trit_types.DEPTHS):
                raise TritGgufError(f"{what} depth {value} does not exist; choose 1, 2, 3 or 4, or 0 for F16")

    @property
    def of_layers(self) -> int:
        """The depth of matrices that are quantized and that `choice` does not name."""
        return self.depth or _DEFAULT_DEPTH

    @property
    def deepest_recovered(self) -> int:
        """The greatest depth that a recovered matrix may have."""
        return self.depth or max(trit_types.DEPTHS)


def parse_rules(text: str) -> list[KeepRule]:
    """Return the rules of `--keep`: `PATTERN=DEPTH` with commas between; TritGgufError for anything else."""
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
    """Return the depths that rules give to some of the names; of several rules for a name the first counts.

    Raises TritGgufError for a rule that no name matches.
    """
    names = list(names)
    for rule in rules:
        if not any(rule.matches(name) for name in names):
            raise TritGgufError(
                f"--keep {rule.pattern}={rule.depth}: no matrix has such a name (they are like {names[0]})"
                if names
                else f"--keep {rule.pattern}={rule.depth}: the model has no matrix to pack"
            )
    chosen = {}
    for name in names:
        matching = [rule.depth for rule in rules if rule.matches(name)]
        if matching:
            chosen[name] = matching[0]
    return chosen


def depths_below_threshold(sensitivities: Sensitivities, threshold: float, deep: int) -> dict[str, int]:
    """Return one trit less than `deep` for every matrix whose sensitivity there stays below the threshold."""
    return {name: deep - 1 if costs[deep - 1] < threshold else deep for name, costs in sensitivities.items()}


def depths_within(
    sensitivities: Sensitivities, weights: Mapping[str, int], target: float, fixed: Mapping[str, int]
) -> dict[str, int]:
    """Return the depths of least total cost whose average stays within a number of bits per weight.

    For a price of a bit, each matrix takes the depth of least cost and price; the lowest price that stays within the
    budget is found by bisection, and what is left goes to the matrices that gain most per bit. That is optimal on the
    convex hull of all choices.

    Args:
        sensitivities: of the matrices that can be chosen for.
        weights: GGUF name -> number of weights, of these and of the fixed ones.
        target: bits per weight in the file, over all of them.
        fixed: depths of other matrices that count towards the average.

    Raises:
        TritGgufError: the target is below what the least depths take.

    """
    budget = target * sum(weights[name] for name in [*sensitivities, *fixed])
    budget -= sum(weights[name] * bits_per_weight(depth) for name, depth in fixed.items())

    def chosen_at(price: float) -> dict[str, int]:
        return {
            name: min(costs, key=lambda depth: costs[depth] + price * weights[name] * bits_per_weight(depth))
            for name, costs in sensitivities.items()
        }

    def bits(depths: Mapping[str, int]) -> float:
        return sum(weights[name] * bits_per_weight(depth) for name, depth in depths.items())

    least = {name: min(costs) for name, costs in sensitivities.items()}
    if bits(least) > budget * (1 + 1e-9):
        raise TritGgufError(f"a target of {target} bits per weight is below what the least depths take; raise it")
    low, high = 0.0, 1.0
    while bits(chosen_at(high)) > budget:
        high *= 2
    if bits(chosen_at(low)) > budget:
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if bits(chosen_at(middle)) > budget else (low, middle)
    else:
        high = low
    depths = chosen_at(high)
    _spend(depths, budget - bits(depths), sensitivities, weights)
    return depths


def _spend(depths: dict[str, int], left: float, sensitivities: Sensitivities, weights: Mapping[str, int]) -> None:
    """Deepen matrices one trit at a time, the greatest gain per bit first, as long as the bits are enough."""
    while True:
        gains = []
        for name, depth in depths.items():
            if depth + 1 in sensitivities[name]:
                price = weights[name] * (bits_per_weight(depth + 1) - bits_per_weight(depth))
                gain = sensitivities[name][depth] - sensitivities[name][depth + 1]
                if price <= left and gain > 0:
                    gains.append((gain / price, name, price))
        if not gains:
            return
        _, name, price = max(gains)
        depths[name] += 1
        left -= price


def bits_per_weight(depth: int) -> float:
    """Return the bits in the file of a weight of this depth; 0 is F16."""
    if depth == F16_DEPTH:
        return 16.0
    return 8 * trit_types.row_bytes(depth, trit_types.BLOCK_SIZE) / trit_types.BLOCK_SIZE


def average_bits(depths: Mapping[str, int], weights: Mapping[str, int]) -> float:
    """Return the bits per weight of matrices in the file."""
    total = np.array([[weights[name] * bits_per_weight(depth), weights[name]] for name, depth in depths.items()])
    return float(total[:, 0].sum() / total[:, 1].sum()) if len(total) else 0.0

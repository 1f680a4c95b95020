"""Simulate programs that publish dequantized trit checkpoints, and test exact recovery on their matrices.

    python -m tools.recovery.simulated_producer --matrices 2000

Random matrices of every depth, many of them hard to recover, are decoded with several orders of operations and
precisions, rounded to 16 bits, recovered, decoded by docs/reference_decoder.py and compared. The matrices are made
without the codec under test. Prints how many matrices of each order were recovered and how many numbers differ.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tools.recovery.recover_roundtrip import bfloat16_bits, differing_numbers
from tritgguf.quantization.recover import NoFit, recover_matrix

Rounding = Callable[[np.ndarray], np.ndarray]

HALVES = ("float16", "bfloat16")
PRECISIONS: dict[str, Rounding] = {
    "float64": lambda values: values.astype(np.float64),
    "float32": lambda values: values.astype(np.float32),
    "float16": lambda values: values.astype(np.float16),
    "bfloat16": lambda values: (bfloat16_bits(values).astype(np.uint32) << np.uint32(16)).view(np.float32),
}


def _scale_times_level(scale: np.ndarray, trits: np.ndarray, h: int, to: Rounding) -> np.ndarray:
    return to(to(scale * _level(trits, to)) / to(np.array(h)))


def _step_times_level(scale: np.ndarray, trits: np.ndarray, h: int, to: Rounding) -> np.ndarray:
    return to(to(scale / to(np.array(h))) * _level(trits, to))


def _fraction_times_scale(scale: np.ndarray, trits: np.ndarray, h: int, to: Rounding) -> np.ndarray:
    return to(to(_level(trits, to) / to(np.array(h))) * scale)


def _sum_of_steps(scale: np.ndarray, trits: np.ndarray, h: int, to: Rounding) -> np.ndarray:
    return _sum(trits, to(scale / to(np.array(h))), to)


def _sum_of_scales(scale: np.ndarray, trits: np.ndarray, h: int, to: Rounding) -> np.ndarray:
    return to(_sum(trits, scale, to) / to(np.array(h)))


def _level(trits: np.ndarray, to: Rounding) -> np.ndarray:
    return to(trits @ 3.0 ** np.arange(trits.shape[-1]))


def _sum(trits: np.ndarray, unit: np.ndarray, to: Rounding) -> np.ndarray:
    """Add trit * (3**k * unit), from the largest k down."""
    total = to(np.zeros(trits.shape[:-1]))
    for k in reversed(range(trits.shape[-1])):
        total = to(total + to(to(trits[..., k]) * to(to(np.array(3**k)) * unit)))
    return total


ORDERS = {
    "scale * level / h": _scale_times_level,
    "scale / h * level": _step_times_level,
    "level / h * scale": _fraction_times_scale,
    "sum of trit * 3**k * (scale / h)": _sum_of_steps,
    "(sum of trit * 3**k * scale) / h": _sum_of_scales,
}


def produce(scales: np.ndarray, trits: np.ndarray, order: str, precision: str, half: str = "float16") -> np.ndarray:
    """Return the published matrix [rows, columns]: float16, or uint16 for the bits of bfloat16.

    Args:
        scales: float32 [rows, groups], each group's scale.
        trits: float64 [rows, groups, 16, depth], -1, 0 or 1, the least significant first.
        order: key of ORDERS.
        precision: key of PRECISIONS, for every operation and the scale.
        half: float16 or bfloat16, the type of the result.

    """
    to = PRECISIONS[precision]
    h = (3 ** trits.shape[-1] - 1) // 2
    weights = ORDERS[order](to(scales)[..., np.newaxis], trits, h, to).reshape(len(scales), -1)
    return weights.astype(np.float16) if half == "float16" else bfloat16_bits(weights)


# -- the matrices


def _trits(level: np.ndarray, depth: int) -> np.ndarray:
    digits = (level.astype(np.int64) + (3**depth - 1) // 2)[..., np.newaxis] // 3 ** np.arange(depth) % 3
    return (digits - 1).astype(np.float64)


def _spaced(generator: np.random.Generator) -> np.ndarray:
    lowest, highest = sorted(generator.uniform(0.001, 1.0, 2).tolist())
    return np.geomspace(lowest, highest, 27).astype(np.float32)


def _level_shapes(generator: np.random.Generator, shape: tuple[int, ...], h: int) -> dict[str, np.ndarray]:
    """Return levels of each difficult kind by name."""
    level = generator.integers(-h, h + 1, shape)
    one = np.zeros(shape, np.int64)
    place = generator.integers(0, 16, (*shape[:2], 1))
    np.put_along_axis(one, place, generator.integers(1, h + 1, place.shape) * generator.choice([-1, 1], place.shape), 2)
    only = np.zeros(shape, np.int64)
    only[0, 0] = level[0, 0]
    return {
        "all levels": level,
        "normal distribution": np.clip(np.rint(generator.standard_normal(shape) * h / 2.5), -h, h).astype(np.int64),
        "largest levels unused": level * 2 // 3,
        "even levels only": level // 2 * 2,
        "a single outlier": one,
        "one group": only,
        "zeros": np.zeros(shape, np.int64),
        "groups of zeros": level * generator.integers(0, 2, (*shape[:2], 1)),
    }


def _codebooks(generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Return codebooks, float32 [27], of each difficult kind by name."""
    spaced = _spaced(generator)
    return {
        "log-spaced": spaced,
        "nearly equal": (spaced[0] * (1 + np.arange(27) * 2.0**-12)).astype(np.float32),
        "three different": np.repeat(spaced[[0, 13, 26]], 9),
        "all equal": np.full(27, spaced[7]),
        "subnormal": spaced * np.float32(1e-5),
        "tiny": spaced * np.float32(1e-7),
        "random": np.sort(generator.uniform(0.01, 1.0, 27)).astype(np.float32),
        "halves": spaced.astype(np.float16).astype(np.float32),
    }


@dataclass(frozen=True)
class Case:
    """A random matrix before decoding; fields as in `produce`."""

    kind: str
    scales: np.ndarray
    trits: np.ndarray


def random_case(seed: int, depth: int) -> Case:
    """Return a matrix whose kind the seed selects: 1 to 40 rows of 64 to 256 weights."""
    generator = np.random.default_rng((seed, depth))
    rows, groups = int(generator.integers(1, 41)), 4 * int(generator.integers(1, 5))
    levels = _level_shapes(generator, (rows, groups, 16), (3**depth - 1) // 2)
    codebooks = _codebooks(generator)
    (level_kind, level), (codebook_kind, codebook) = list(itertools.product(levels.items(), codebooks.items()))[
        seed % (len(levels) * len(codebooks))
    ]
    scales = codebook[generator.integers(0, 27, (rows, groups))]
    return Case(f"{level_kind}, {codebook_kind}", scales, _trits(level, depth))


# -- the test


def main() -> None:
    """Parse the command line, test, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--matrices", type=int, default=2000, help="number of matrices (default 2000)")
    parser.add_argument("--half", choices=HALVES, default="float16", help="type of the published weights")
    parser.add_argument("--only", default="", help="only kinds whose names have this, such as `all levels, log-spaced`")
    options = parser.parse_args()
    thread_pool = ThreadPool(1)
    precisions = ["float64", "float32", options.half]
    results: dict[tuple[str, str], dict[int, list[int | None]]] = defaultdict(lambda: defaultdict(list))
    refused: dict[str, int] = defaultdict(int)
    variants = list(itertools.product(ORDERS, precisions, range(1, 5)))
    seeds = (seed for seed in itertools.count() if options.only in random_case(seed, 1).kind)
    for number, (order, precision, depth) in zip(range(options.matrices), itertools.cycle(variants), strict=False):
        if number % len(variants) == 0:
            seed = next(seeds)
        case = random_case(seed, depth)
        weights = produce(case.scales, case.trits, order, precision, options.half)
        matrix = recover_matrix(weights, thread_pool)
        if isinstance(matrix, NoFit):
            refused[matrix.reason.split(" (")[0]] += 1
            results[order, precision][depth].append(None)
        else:
            results[order, precision][depth].append(differing_numbers(matrix, weights))
    print(f"{'recovered / matrices at depth':46} {'1':>8} {'2':>8} {'3':>8} {'4':>8}  differing numbers")
    for (order, precision), by_depth in sorted(results.items()):
        cells = [f"{sum(r is not None for r in by_depth[d])}/{len(by_depth[d])}".rjust(8) for d in range(1, 5)]
        differing = sum(result or 0 for results_of_depth in by_depth.values() for result in results_of_depth)
        print(f"{order:35} {precision:10} {' '.join(cells)}  {differing}")
    for reason, count in sorted(refused.items()):
        print(f"{count} refused: {reason}")


if __name__ == "__main__":
    main()

"""Which matrices of a source hold dequantized trits: decided before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cpu_kernels.threads.crew import Crew
from tritgguf.conversion import encoders
from tritgguf.errors import TritGgufError
from tritgguf.quantization import matrix_encoders
from tritgguf.quantization.recover import Fit, NoFit, find_fit
from tritgguf.sources.source import Source

AUTOMATIC, RECOVER, _OR = "auto", "recover", "+"
_PROBES = 4  # matrices that are looked at first; where none of them fits, no other is read
_NAMED = 3  # tensors that a message names


def encoder_names() -> list[str]:
    """Return what `convert` takes as its encoder."""
    return [AUTOMATIC, RECOVER, *(f"{RECOVER}{_OR}{name}" for name in encoders.NAMES), *encoders.NAMES]


@dataclass(frozen=True)
class RecoveryPlan:
    """How a source's matrices are to be encoded.

    Attributes:
        encoder: its name for the report and for the file's metadata: what was really used.
        fallback: one of `encoders.NAMES`, for the matrices that are not in `fits`.
        fits: matrices that are recovered exactly, by GGUF name.
        warnings: a line for the user where some are not and that was asked for.

    """

    encoder: str
    fallback: str
    fits: dict[str, Fit] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def plan_recovery(
    source: Source,
    names: Sequence[str],
    encoder: str,
    deepest: int,
    crew: Crew,
    progress: Callable[[str], None] = lambda name: None,
    default: str = matrix_encoders.DEFAULT_ENCODER,
) -> RecoveryPlan:
    """Decide which matrices are recovered and how the others are encoded.

    `auto` recovers if most weights have an exact fit and then wants one for all; it reads a few matrices only where
    there is nothing to recover. `recover` wants a fit for all, `recover+NAME` encodes those without one by NAME, and
    any other encoder is left to itself.

    Args:
        source: the checkpoint.
        names: its matrices that are to be packed.
        encoder: one of `encoder_names`.
        deepest: the greatest depth to try.
        crew: the threads to use.
        progress: called with the name of each matrix that was looked through, the first few excepted.
        default: one of `encoders.NAMES`, for what `auto` does not recover.

    Raises:
        TritGgufError: a matrix has no exact fit, and the encoder says not what to do with it.

    """
    if encoder in encoders.NAMES:
        return RecoveryPlan(encoder, encoder)
    fallback = encoder.rpartition(_OR)[2] if _OR in encoder else default
    found: dict[str, Fit | NoFit] = {}

    def look(name: str) -> None:
        found[name] = find_fit(source.rows(name).held(), deepest=deepest, crew=crew)
        source.release(name)

    if encoder == AUTOMATIC:
        for place in np.unique(np.linspace(0, len(names) - 1, min(len(names), _PROBES)).astype(int)):
            look(names[place])
        if not any(map(_is_recovered, found.values())):
            return RecoveryPlan(fallback, fallback)
    if not names and encoder == RECOVER:
        raise TritGgufError(f"{source.name}: has no matrix to recover trits from; leave --encoder {RECOVER} away")
    for name in names:
        if name not in found:
            look(name)
            progress(name)
    if encoder == AUTOMATIC and not _are_most(source, found):
        return RecoveryPlan(fallback, fallback)
    fits = {name: fit for name, fit in found.items() if isinstance(fit, Fit)}
    if len(fits) == len(found):
        return RecoveryPlan(RECOVER, fallback, fits)
    message = _list_of_misfits(source, found)
    if _OR not in encoder:
        raise TritGgufError(
            f"{message}; --encoder {RECOVER}{_OR}{fallback} quantizes those again, --encoder {fallback} all of them"
        )
    return RecoveryPlan(encoder, fallback, fits, [f"{message}; quantized by {fallback}"])


def _is_recovered(fit: Fit | NoFit) -> bool:
    """Tell whether a matrix holds trits; zeros, which fit too, say nothing about where they come from."""
    return isinstance(fit, Fit) and bool(fit.codebook.any())


def _are_most(source: Source, found: dict[str, Fit | NoFit]) -> bool:
    """Tell whether more weights are recovered than are not; matrices of zeros do not count."""
    weights = {tensor.name: math.prod(tensor.shape) for tensor in source.tensors}
    recovered = sum(weights[name] for name, fit in found.items() if _is_recovered(fit))
    return recovered > sum(weights[name] for name, fit in found.items() if isinstance(fit, NoFit))


def _list_of_misfits(source: Source, found: dict[str, Fit | NoFit]) -> str:
    misfits = [f"tensor {name} {fit.reason}" for name, fit in found.items() if isinstance(fit, NoFit)]
    listed = ", ".join(misfits[:_NAMED])
    more = f" and {len(misfits) - _NAMED} more" if len(misfits) > _NAMED else ""
    return f"{source.name}: {len(misfits)} of {len(found)} matrices cannot be recovered exactly: {listed}{more}"

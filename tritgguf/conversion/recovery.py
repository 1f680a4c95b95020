"""Which matrices of a source hold dequantized trits: decided before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.conversion.encoders import Automatic, Encoder, Quantizer, Recover
from tritgguf.errors import TritGgufError
from tritgguf.quantization.recover import Fit, NoFit, find_fit
from tritgguf.sources.source import Source

_PROBES = 4  # matrices that are looked at first; where none of them fits, no other is read
_NAMED = 3  # tensors that a message names


@dataclass(frozen=True)
class RecoveryPlan:
    """Which matrices are recovered; the others are quantized.

    Attributes:
        encoder: the name for the report and for the file's metadata: the encoder that is really used.
        fits: GGUF name -> exact fit, of the matrices that are recovered.
        warnings: a line for the user where recovery was asked for and some matrices have no exact fit.

    """

    encoder: str
    fits: dict[str, Fit] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def plan_recovery(
    source: Source,
    names: Sequence[str],
    encoder: Encoder,
    quantizer: Quantizer,
    deepest: int,
    thread_pool: ThreadPool,
    progress: Callable[[str], None] = lambda name: None,
) -> RecoveryPlan:
    """Decide which matrices are recovered.

    `Automatic` recovers if most weights have an exact fit, and then every matrix must have one; it reads only a few
    matrices where there is nothing to recover. `Recover` looks at every matrix; a quantizer recovers none.

    Args:
        source: the checkpoint.
        names: its matrices that are to be packed.
        encoder: the encoder that the user has chosen.
        quantizer: for the matrices that are not recovered.
        deepest: the greatest depth to try.
        thread_pool: the threads to use.
        progress: called with the name of each matrix that was searched, except the first few.

    Raises:
        TritGgufError: a matrix has no exact fit, and the encoder does not say how to quantize it.

    """
    if not isinstance(encoder, Recover | Automatic):
        return RecoveryPlan(encoder.name)
    is_automatic = isinstance(encoder, Automatic)
    must_fit = is_automatic or encoder.otherwise is None
    found: dict[str, Fit | NoFit] = {}

    def look(name: str) -> None:
        found[name] = find_fit(source.rows(name).held(), deepest=deepest, thread_pool=thread_pool)
        source.release(name)

    if is_automatic:
        for position in np.unique(np.linspace(0, len(names) - 1, min(len(names), _PROBES)).astype(int)):
            look(names[position])
        if not any(map(_is_recovered, found.values())):
            return RecoveryPlan(quantizer.name)
    elif must_fit and not names:
        raise TritGgufError(f"{source.name}: has no matrix to recover trits from; leave --encoder recover away")
    for name in names:
        if name not in found:
            look(name)
            progress(name)
    if is_automatic and not _are_most(source, found):
        return RecoveryPlan(quantizer.name)
    fits = {name: fit for name, fit in found.items() if isinstance(fit, Fit)}
    if len(fits) == len(found):
        return RecoveryPlan(Recover().name, fits)
    message = _list_of_misfits(source, found)
    if must_fit:
        both = Recover(quantizer).name
        raise TritGgufError(
            f"{message}; --encoder {both} quantizes those again, --encoder {quantizer.name} all of them"
        )
    return RecoveryPlan(encoder.name, fits, [f"{message}; quantized by {quantizer.name}"])


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

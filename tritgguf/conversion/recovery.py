"""Find the matrices of a source that hold dequantized trits, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.conversion.encoders import Automatic, Encoder, Quantizer, Recover
from tritgguf.errors import TritGgufError
from tritgguf.formats.trit_types import BLOCK_SIZE
from tritgguf.quantization.recover import Fit, NoFit, find_fit
from tritgguf.sources.source import Source

_PROBES = 4  # matrices that are searched first; if none of them fits, no other is read
_MAX_NAMED = 3  # tensors that a message names


@dataclass(frozen=True)
class RecoveryPlan:
    """The matrices that are recovered; others are quantized.

    Attributes:
        encoder: name of the encoder that is actually used, for the report and the file's metadata.
        fits: GGUF name -> exact fit, of the recovered matrices.
        warnings: one line for the user if recovery was requested and some matrices have no exact fit.

    """

    encoder: str
    fits: dict[str, Fit] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def limited(self, depths: Mapping[str, int]) -> RecoveryPlan:
        """Return the plan without the fits that need more trits than a depth, by GGUF name, allows."""
        fits = {name: fit for name, fit in self.fits.items() if fit.depth <= depths.get(name, fit.depth)}
        return replace(self, fits=fits)


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

    `Automatic` recovers if most weights have an exact fit; then every matrix must have one. It searches a few probes
    first and reads no other matrix if none of them fits. `Recover` searches every matrix; a quantizer recovers none.

    Args:
        source: the checkpoint.
        names: its matrices that are packed.
        encoder: the user's encoder.
        quantizer: quantizer of the matrices that are not recovered.
        deepest: the maximum depth to try.
        thread_pool: the threads to use.
        progress: called with the name of each matrix that was searched, except for the probes.

    Raises:
        TritGgufError: a matrix has no exact fit, and the encoder has no fallback.

    """
    if not isinstance(encoder, Recover | Automatic):
        return RecoveryPlan(encoder.name)
    is_automatic = isinstance(encoder, Automatic)
    must_fit = is_automatic or encoder.fallback is None
    found: dict[str, Fit | NoFit] = {}

    def search(name: str) -> None:
        found[name] = find_fit(source.rows(name).held(), deepest=deepest, thread_pool=thread_pool)
        source.release(name)

    if is_automatic:
        for index in np.unique(np.linspace(0, len(names) - 1, min(len(names), _PROBES)).astype(int)):
            search(names[index])
        if not any(map(_is_recovered, found.values())):
            return RecoveryPlan(quantizer.name)
    elif must_fit and not names:
        raise TritGgufError(f"{source.name}: has no matrix to recover trits from; omit --encoder recover")
    for name in names:
        if name not in found:
            search(name)
            progress(name)
    if is_automatic and not _is_majority(source, found):
        return RecoveryPlan(quantizer.name)
    fits = {name: fit for name, fit in found.items() if isinstance(fit, Fit)}
    if len(fits) == len(found):
        return RecoveryPlan(Recover().name, fits)
    message = _describe_misfits(source, found)
    if must_fit:
        both = Recover(quantizer).name
        raise TritGgufError(
            f"{message}; --encoder {both} quantizes those again, --encoder {quantizer.name} all of them"
        )
    return RecoveryPlan(encoder.name, fits, [f"{message}; quantized by {quantizer.name}"])


def recover_tables(
    source: Source,
    recovery: RecoveryPlan,
    limits: Mapping[str, int],
    thread_pool: ThreadPool,
    progress: Callable[[str], None] = lambda name: None,
) -> RecoveryPlan:
    """Return the plan with those of the embeddings and the output head that hold dequantized trits, too.

    Args:
        source: the checkpoint.
        recovery: the plan for the matrices of the layers.
        limits: GGUF name -> greatest depth, 0 for tables that are not packed.
        thread_pool: the threads to use.
        progress: called with the name of each table that has an exact fit.

    """
    fits = dict(recovery.fits)
    for tensor in source.tensors:
        name = tensor.name
        deepest = limits.get(name, 0)
        if not deepest or tensor.shape[-1] % BLOCK_SIZE or source.packed(name) is not None:
            continue
        fit = find_fit(source.rows(name).held(), deepest=deepest, thread_pool=thread_pool)
        source.release(name)
        if isinstance(fit, Fit) and _is_recovered(fit):
            fits[name] = fit
            progress(name)
    return replace(recovery, fits=fits)


def _is_recovered(fit: Fit | NoFit) -> bool:
    """Return whether a matrix holds dequantized trits. All-zero matrices fit too but are no evidence of that."""
    return isinstance(fit, Fit) and bool(fit.codebook.any())


def _is_majority(source: Source, found: dict[str, Fit | NoFit]) -> bool:
    """Return whether more weights are recovered than not, ignoring all-zero matrices."""
    weights = {tensor.name: math.prod(tensor.shape) for tensor in source.tensors}
    recovered = sum(weights[name] for name, fit in found.items() if _is_recovered(fit))
    return recovered > sum(weights[name] for name, fit in found.items() if isinstance(fit, NoFit))


def _describe_misfits(source: Source, found: dict[str, Fit | NoFit]) -> str:
    misfits = [f"tensor {name} {fit.reason}" for name, fit in found.items() if isinstance(fit, NoFit)]
    return f"{source.name}: {len(misfits)} of {len(found)} matrices cannot be recovered exactly: {named(misfits)}"


def named(items: Sequence[str]) -> str:
    """Return the first few items for a message, and how many more there are."""
    more = f" and {len(items) - _MAX_NAMED} more" if len(items) > _MAX_NAMED else ""
    return ", ".join(items[:_MAX_NAMED]) + more

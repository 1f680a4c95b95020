"""Find the matrices of a source that hold dequantized trits, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.conversion.encoders import Automatic, Encoder, Quantizer, Recover
from tritgguf.errors import TritGgufError
from tritgguf.formats.stacks import matrix_shape, split_matrix_name
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
        fits: name of a matrix -> exact fit, of the recovered matrices. All those of a stack have the same depth.
        warnings: lines for the user, about matrices without an exact fit and about rules for others.

    """

    encoder: str
    fits: dict[str, Fit] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def depths(self) -> dict[str, int]:
        """GGUF name of a tensor with recovered matrices -> their trits per weight."""
        return {split_matrix_name(name)[0]: fit.depth for name, fit in self.fits.items()}

    def limited(self, source: str, kept: Mapping[str, int], encoder: Encoder, quantizer: Quantizer) -> RecoveryPlan:
        """Return the plan without the fits that need more trits than rules allow.

        Args:
            source: name of the checkpoint.
            kept: GGUF name of a tensor -> the depth that a rule sets.
            encoder, quantizer: as in `plan_recovery`.

        Raises:
            TritGgufError: there are such fits, and the encoder has no fallback.

        """
        allowed = {name: kept.get(split_matrix_name(name)[0], fit.depth) for name, fit in self.fits.items()}
        lost = [name for name, fit in self.fits.items() if allowed[name] < fit.depth]
        warnings, encoder_name = list(self.warnings), self.encoder
        if smaller := [name for name, fit in self.fits.items() if allowed[name] > fit.depth]:
            warnings.append(f"fewer trits than --keep sets are exact, and stay: {named(smaller)}")
        if lost:
            message = f"{source}: --keep sets fewer trits than these matrices hold: {named(lost)}"
            if isinstance(encoder, Recover) and encoder.fallback is None:
                both = f"--encoder {Recover(quantizer).name} quantizes those again"
                raise TritGgufError(f"{message}; omit the rule, or {both}")
            warnings.append(f"{message}; quantized by {quantizer.name}")
            encoder_name = Recover(quantizer).name if len(lost) < len(self.fits) else quantizer.name
        fits = {name: fit for name, fit in self.fits.items() if allowed[name] >= fit.depth}
        return RecoveryPlan(encoder_name, fits, warnings)


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
        names: its matrices that are packed, see `stacks`.
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
        for name in _probes(names):
            search(name)
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
    _fit_stacks_at_one_depth(source, found, thread_pool)
    fits = {name: fit for name, fit in found.items() if isinstance(fit, Fit)}
    if len(fits) == len(found):
        return RecoveryPlan(Recover().name, fits)
    message = _describe_misfits(source, found)
    if must_fit:
        both = f"--encoder {Recover(quantizer).name} quantizes those again"
        raise TritGgufError(f"{message}; {both}, --encoder {quantizer.name} all of them")
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
        if not deepest or tensor.shape[-1] % BLOCK_SIZE or source.packed_depth(name) is not None:
            continue
        fit = find_fit(source.rows(name).held(), deepest=deepest, thread_pool=thread_pool)
        source.release(name)
        if isinstance(fit, Fit) and _is_recovered(fit):
            fits[name] = fit
            progress(name)
    return replace(recovery, fits=fits)


def holds_trits(source: Source, names: Sequence[str], deepest: int, thread_pool: ThreadPool) -> bool:
    """Return whether one of a few matrices holds dequantized trits, so that `Automatic` searches them all."""
    probes = ((name, source.rows(name).held()) for name in _probes(names))
    fits = {name: find_fit(rows, deepest=deepest, thread_pool=thread_pool) for name, rows in probes}
    return any(map(_is_recovered, fits.values()))


def _probes(names: Sequence[str]) -> list[str]:
    """Return a few names, evenly spaced."""
    indices = np.unique(np.linspace(0, len(names) - 1, min(len(names), _PROBES)).astype(int))
    return [names[index] for index in indices]


def _fit_stacks_at_one_depth(source: Source, found: dict[str, Fit | NoFit], thread_pool: ThreadPool) -> None:
    """Fit the matrices of a stack again that fit at a lesser depth than another one, because a tensor has one depth."""
    depths: dict[str, int] = {}
    for name, fit in found.items():
        tensor, index = split_matrix_name(name)
        if isinstance(fit, Fit) and index is not None:
            depths[tensor] = max(fit.depth, depths.get(tensor, 0))
    for name, fit in found.items():
        depth = depths.get(split_matrix_name(name)[0])
        if isinstance(fit, Fit) and depth is not None and fit.depth != depth:
            found[name] = find_fit(source.rows(name).held(), shallowest=depth, deepest=depth, thread_pool=thread_pool)
            source.release(name)


def _is_recovered(fit: Fit | NoFit) -> bool:
    """Return whether a matrix holds dequantized trits. All-zero matrices fit too but are no evidence of that."""
    return isinstance(fit, Fit) and bool(fit.codebook.any())


def _is_majority(source: Source, found: dict[str, Fit | NoFit]) -> bool:
    """Return whether more weights are recovered than not, ignoring all-zero matrices."""
    weights = {name: math.prod(matrix_shape(tensor.shape)) for tensor in source.tensors for name in tensor.matrices}
    recovered = sum(weights[name] for name, fit in found.items() if _is_recovered(fit))
    return recovered > sum(weights[name] for name, fit in found.items() if isinstance(fit, NoFit))


def _describe_misfits(source: Source, found: dict[str, Fit | NoFit]) -> str:
    misfits = [f"tensor {name} {fit.reason}" for name, fit in found.items() if isinstance(fit, NoFit)]
    return f"{source.name}: {len(misfits)} of {len(found)} matrices cannot be recovered exactly: {named(misfits)}"


def named(items: Sequence[str]) -> str:
    """Return the first few items for a message, and how many more there are."""
    more = f" and {len(items) - _MAX_NAMED} more" if len(items) > _MAX_NAMED else ""
    return ", ".join(items[:_MAX_NAMED]) + more

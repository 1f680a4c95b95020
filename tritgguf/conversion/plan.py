"""Plan a conversion: the depth, type and order of every tensor in the file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import xxhash
from gguf import GGUFValue

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.architectures.tensor_names import EMBEDDINGS, HEAD, kept_in_float32, quantized_tensor
from tritgguf.calibration.end_to_end import FEWEST_WINDOWS
from tritgguf.calibration.text import WINDOW_TOKENS
from tritgguf.calibration.tuning import check_no_experts
from tritgguf.conversion.depths import F16_DEPTH, NO_CHOICE, Costs, DepthOptions, MeasuredCosts, apply_rules
from tritgguf.conversion.encoders import (
    Calibrated,
    Encoder,
    Importance,
    ImportanceSearch,
    Quantizer,
    Recover,
    Windows,
    quantizer_of,
)
from tritgguf.conversion.file_metadata import file_metadata
from tritgguf.conversion.recovery import RecoveryPlan, named, plan_recovery, recover_tables
from tritgguf.conversion.requested_depths import (
    TABLES,
    free_tables,
    packable_matrices,
    requested_depths,
    unpacked_matrices,
)
from tritgguf.errors import TritGgufError
from tritgguf.formats import trit_types
from tritgguf.formats.gguf_header import F16, F32
from tritgguf.formats.gguf_writer import ALIGNMENT, PlannedTensor, planned_file_bytes
from tritgguf.formats.stacks import split_matrix_name
from tritgguf.formats.trit_types import TritType
from tritgguf.sources.source import Source, file_states
from tritgguf.version import __version__

MEASURED_TOKENS = 4 * WINDOW_TOKENS
"""Tokens of the calibration text on which costs are measured, at most; and a window."""
_CALIBRATED_COST = 0.4  # of what is measured without calibration; `docs/quality.md` has the ratios of two models


@dataclass(frozen=True)
class ConversionPlan:
    """The decisions that are made before anything is written.

    Attributes:
        source: the model.
        tensors: the file's tensors, in order.
        depths: GGUF name of a tensor -> requested trits per weight, 0 for tensors that are not packed.
        depth: the greatest depth of the layers' matrices.
        recovery: the matrices that are recovered.
        quantizer: quantizer of the other packed matrices.
        metadata: the file's keys and values.
        windows: the calibration text; None for none.

    """

    source: Source
    tensors: list[PlannedTensor]
    depths: dict[str, int]
    depth: int
    recovery: RecoveryPlan
    quantizer: Quantizer
    metadata: dict[str, GGUFValue]
    windows: Windows | None

    @property
    def quantized_depths(self) -> dict[str, int]:
        """Name of a matrix -> trits per weight, of those that are packed, but neither recovered nor copied."""
        return {
            matrix: self.depths[tensor.name]
            for tensor in self.tensors
            if trit_types.is_trit_type(tensor.type_id)
            and self.source.packed_depth(tensor.name) != self.depths[tensor.name]
            for matrix in tensor.matrices
            if matrix not in self.recovery.fits
        }

    @property
    def kept_unaligned(self) -> list[str]:
        """Matrices that stay in F16 because their row length is not a multiple of 64."""
        return [tensor.name for tensor in self.tensors if self.depths[tensor.name] and tensor.type_id == F16]

    @property
    def warnings(self) -> list[str]:
        """Warnings for the user, one line each."""
        return [
            *self.source.warnings,
            *_requantization_warning(self.source, self.tensors),
            *self.recovery.warnings,
            *self._importance_warning(),
        ]

    def _importance_warning(self) -> list[str]:
        """Warn if the importance matrix lacks matrices of the layers."""
        if not isinstance(self.quantizer, ImportanceSearch):
            return []
        known = self.quantizer.importance or {}
        in_layers = [name for name in self.quantized_depths if quantized_tensor(name)]
        missing = [name for name in in_layers if name not in known]
        if not missing:
            return []
        only_experts = all(split_matrix_name(name)[1] is not None for name in missing)
        reason = "its text reached none of these experts" if only_experts else "is it of this model?"
        return [
            f"the importance matrix has nothing for {len(missing)} of {len(in_layers)} matrices ({named(missing)}),"
            f" which are quantized without it; {reason}"
        ]

    def job(self, threads: int) -> dict[str, Any]:
        """Return everything that determines the file's bytes, for its journal: hashes and plain values."""
        importance = self.quantizer.importance if isinstance(self.quantizer, ImportanceSearch) else None
        digest = xxhash.xxh3_128()
        for name in sorted(importance or {}):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray((importance or {})[name]).data)
        for window in self.windows or ():
            digest.update(np.array(window, np.int64).data)
        for key, value in self.metadata.items():
            digest.update(f"{key}={value.type}:{value.value!r}".encode("utf-8", "surrogatepass"))
        return {
            "version": __version__,
            "source": file_states(self.source),
            "tensors": [(tensor.name, tensor.type_id, tensor.n_bytes) for tensor in self.tensors],
            "settings": digest.hexdigest(),
            "threads": threads
            if self.windows is not None
            else None,  # results on a text depend on the number of threads
        }


def plan_conversion(
    source: Source,
    options: DepthOptions,
    encoder: Encoder,
    importance: Importance | None,
    windows: Windows | None,
    thread_pool: ThreadPool,
    searched: Callable[[str], None] = lambda name: None,
    measured: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionPlan:
    """Plan what a conversion writes.

    Args:
        source: the model.
        options: the requested depths.
        encoder: the encoder of the matrices.
        importance: an importance matrix for the encoder; None if there is none or the encoder has one.
        windows: a text for the encoder and for measuring sensitivities; None if there is none or the encoder has one.
        thread_pool: the threads to use.
        searched: called with the name of each matrix that was searched for dequantized trits, except for the probes.
        measured: called while costs of depths are measured, with the number of blocks done and their total.

    Raises:
        TritGgufError: options contradict each other or the source.

    """
    quantizer = quantizer_of(encoder, importance, windows, text_has_other_use=options.choice.needs_text)
    windows = quantizer.windows if isinstance(quantizer, Calibrated) else windows
    _check_inputs(source, quantizer)
    depths = requested_depths(source, options)
    packable = packable_matrices(source, depths)
    kept = apply_rules(packable, options.choice.keep)
    unpacked = unpacked_matrices(source, packable, kept)
    recovery = plan_recovery(source, unpacked, encoder, quantizer, options.max_recovered_depth, thread_pool, searched)
    recovery = recovery.limited(source.name, kept, encoder, quantizer)
    free = free_tables(source, options)
    if recovery.fits or isinstance(encoder, Recover):
        limits = {name: max(trit_types.DEPTHS) if name in free else depths[name] for name in TABLES if name in depths}
        recovery = recover_tables(source, recovery, limits, thread_pool, searched)
        depths |= dict.fromkeys(free, F16_DEPTH)  # recovery changes no weight
    depths |= recovery.depths
    to_choose = packable | free if options.choice.has_target else packable
    to_choose = {name: weights for name, weights in to_choose.items() if name not in recovery.depths}
    choice_text = _choice_text(options, to_choose, recovery)
    measure = partial(_measure_costs, source, options, quantizer, windows, thread_pool, measured)
    other_bytes = partial(_other_bytes, source, depths, to_choose, recovery.encoder, choice_text)
    depths |= options.choice.depths(to_choose, kept, options.layer_depth, measure, other_bytes)
    tensors = [planned_tensor(tensor.name, tensor.shape, depths[tensor.name]) for tensor in source.tensors]
    if quantizer.in_block_order:
        # Checkpoints may store block 10 before block 2. A packed head is encoded for its inputs, after all blocks.
        last = HEAD if HEAD in depths else EMBEDDINGS
        tensors.sort(key=lambda t: math.inf if t.name == last and depths[last] else block_index(t.name))
    depth = max((depths[name] for name in depths if quantized_tensor(name)), default=options.layer_depth)
    if not options.choice.has_target:
        encoder_name, choice_text = _names_of_copies(source, tensors, depths, recovery.encoder, choice_text)
        recovery = replace(recovery, encoder=encoder_name)
    metadata = file_metadata(source.metadata, tensors, recovery.encoder, choice_text)
    return ConversionPlan(source, tensors, depths, depth, recovery, quantizer, metadata, windows)


def check_conversion(source: Source, options: DepthOptions, encoder: Encoder) -> None:
    """Raise TritGgufError for depths, rules and an encoder that do not fit the source, as `convert` does, at once."""
    depths = requested_depths(source, options)
    packable = packable_matrices(source, depths)
    kept = apply_rules(packable, options.choice.keep)
    choice = options.choice
    to_choose = packable | free_tables(source, options) if choice.has_target else packable
    # Whatever the costs turn out to be, some depths must do what the options ask.
    other_bytes = partial(_other_bytes, source, depths, to_choose, encoder.name, choice.describe(options.layer_depth))
    choice.depths(to_choose, kept, options.layer_depth, _no_costs, other_bytes)
    depths |= kept
    if isinstance(encoder, Calibrated) and (encoder.tuning or encoder.end_to_end):
        packed = [tensor for tensor in source.tensors if tensor.name in packable and depths[tensor.name]]
        check_no_experts(source.name, [matrix for tensor in packed for matrix in tensor.matrices])


def _choice_text(options: DepthOptions, to_choose: Collection[str], recovery: RecoveryPlan) -> str:
    """Describe the choice for the file's metadata, without what it does not decide: recovered matrices' depths."""
    if not recovery.fits:
        return options.choice.describe(options.layer_depth)
    rules = tuple(rule for rule in options.choice.keep if any(map(rule.matches, to_choose)))
    choice = replace(options.choice, keep=rules)
    if not to_choose or choice == NO_CHOICE:
        return ""
    return f"{choice.describe(options.layer_depth)}, recovered trits as they are"


def _no_costs(names: list[str], some_depths: Sequence[int]) -> Costs:
    """Return the costs of matrices before anything is measured; embeddings and head may also stay in F16."""
    return {name: dict.fromkeys([*some_depths, *[F16_DEPTH] * (name in TABLES)], 0.0) for name in names}


def _names_of_copies(
    source: Source, tensors: Sequence[PlannedTensor], depths: Mapping[str, int], encoder: str, choice_text: str
) -> tuple[str, str]:
    """Return the encoder and the choice of depths to name in the file: the source's of what is copied, and the new."""
    packed = [t.name for t in tensors if quantized_tensor(t.name) and trit_types.is_trit_type(t.type_id)]
    copied = [name for name in packed if source.packed_depth(name) == depths[name]]
    old = source.encoding.get(trit_types.KEY_ENCODER, encoder)
    if not copied:
        return encoder, choice_text
    if len(copied) == len(packed):
        return old, choice_text or source.encoding.get(trit_types.KEY_DEPTHS, "")
    return "+".join(dict.fromkeys((old, encoder))), choice_text


def _check_inputs(source: Source, quantizer: Quantizer) -> None:
    """Raise TritGgufError for a text that is too short to train on, or an importance of matrices of another shape."""
    if isinstance(quantizer, Calibrated) and quantizer.end_to_end is not None:
        count = len(quantizer.windows or ())
        if count < FEWEST_WINDOWS:
            raise TritGgufError(
                f"training end to end needs {FEWEST_WINDOWS} windows of text, one to train on and one to stop by, and"
                f" there is {count}; give a longer text or more --tokens"
            )
    importance = (quantizer.importance or {}) if isinstance(quantizer, ImportanceSearch) else {}
    columns = {matrix: tensor.shape[-1] for tensor in source.tensors for matrix in tensor.matrices}
    for matrix, given in importance.items():
        if matrix in columns and given.shape != (columns[matrix],):
            raise TritGgufError(
                f"{source.name}: tensor {matrix} has {columns[matrix]} columns, its importance the shape"
                f" {given.shape}; measure the importance of this model"
            )


def _other_bytes(
    source: Source, depths: Mapping[str, int], matrices: Collection[str], encoder: str, choice_text: str
) -> int:
    """Return at most how many bytes the file has besides some matrices, whatever their depths are."""
    packed = {**depths, **dict.fromkeys(matrices, 1)}
    planned = [planned_tensor(tensor.name, tensor.shape, packed[tensor.name]) for tensor in source.tensors]
    of_matrices = sum(tensor.n_bytes for tensor in planned if tensor.name in matrices)
    padding = ALIGNMENT * len(matrices)
    return (
        planned_file_bytes(file_metadata(source.metadata, planned, encoder, choice_text), planned)
        - of_matrices
        + padding
    )


def _measure_costs(
    source: Source,
    options: DepthOptions,
    quantizer: Quantizer,
    windows: Windows | None,
    thread_pool: ThreadPool,
    progress: Callable[[int, int], None],
    names: list[str],
    some_depths: Sequence[int],
) -> Costs:
    """Measure what depths of matrices cost: divergences for a target, else errors of the blocks' outputs."""
    if windows is None:
        raise TritGgufError("choosing depths by measurement needs a calibration text; give --text or --self")
    some = windows[: max(1, MEASURED_TOKENS // len(windows[0]))]
    choice = options.choice
    known = choice.known or MeasuredCosts(() if choice.sensitivity is None else (choice.sensitivity,))

    def sensitivities(names: list[str], some_depths: Sequence[int]) -> Costs:
        from tritgguf.calibration.sensitivity import measure_sensitivities

        return measure_sensitivities(
            source, names, some_depths, some, thread_pool, progress, thresholds=known.thresholds
        )

    def divergences(names: list[str], some_depths: Sequence[int]) -> Costs:
        from tritgguf.calibration.divergence_costs import measure_divergence_costs

        return measure_divergence_costs(source, names, some_depths, some, thread_pool, progress)

    if not choice.has_target:
        return known.of(f"sensitivity, for {known.thresholds}", names, some_depths, sensitivities)
    factor = _CALIBRATED_COST if isinstance(quantizer, Calibrated) else 1.0
    return {
        name: {**of_depths, F16_DEPTH: 0.0} if name in TABLES else {d: factor * cost for d, cost in of_depths.items()}
        for name, of_depths in known.of("divergence", names, some_depths, divergences).items()
    }


def planned_tensor(name: str, shape: tuple[int, ...], depth: int) -> PlannedTensor:
    """Choose a tensor's type in the file: F32 for vectors and routers, trits for matrices with a depth, else F16."""
    weights = int(np.prod(shape, dtype=np.int64))
    if len(shape) == 1 or kept_in_float32(name):
        return PlannedTensor(name, shape, F32, 4 * weights)
    if depth and shape[-1] % trit_types.BLOCK_SIZE == 0:
        rows = weights // shape[-1]
        return PlannedTensor(name, shape, TritType.of_depth(depth), rows * trit_types.row_bytes(depth, shape[-1]))
    return PlannedTensor(name, shape, F16, 2 * weights)


def block_index(name: str) -> int:
    """Return the index of the decoder block in a tensor's GGUF name; -1 if it is in none."""
    block = re.match(r"blk\.(\d+)\.", name)
    return int(block[1]) if block else -1


def _requantization_warning(source: Source, tensors: Sequence[PlannedTensor]) -> list[str]:
    """Warn if packed tensors are decoded and stored in another type."""
    packed = [(source.packed_depth(tensor.name), tensor.type_id) for tensor in tensors]
    decoded = [depth for depth, type_id in packed if depth and TritType.of_depth(depth) != type_id]
    if not decoded:
        return []
    depths = ", ".join(map(str, sorted(set(decoded))))
    return [
        f"{source.name}: {len(decoded)} tensors are packed already (depth {depths}); storing them otherwise adds to"
        " what that lost, so convert the original where you have it"
    ]

"""Every kernel that the program runs, with the argument types that it runs it with: what `precompile` compiles.

A kernel that is missing here is compiled when it is first needed (`tests/cpu_kernels/test_precompile.py` notices it).
So is generation with keys and values in anything but float16, which few need. Arrays of files are read-only; all arrays
are contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cpu_kernels.compilation.signature import WRITABLE, Type, array_type
from cpu_kernels.encoding import error_feedback, quantize, recover, refinement, search
from cpu_kernels.packed_rows import check_words, pack, unpack
from cpu_kernels.simd import self_test
from cpu_kernels.threads import bandwidth, barrier
from cpu_kernels.transformer import (
    activations,
    attend_layers,
    attend_token,
    attention,
    decode,
    decode_batch,
    delta_net,
    experts,
    experts_batch,
    experts_prompt,
    gemm,
    gemv,
    gemv_batch,
    kv_pages,
    layer_options,
    rotation,
    router,
    short_convolution,
    swiglu,
)

_INTEGER, _FLOAT, _BOOLEAN = int, np.dtype(np.float32), bool
_SHARE = (_INTEGER, _INTEGER)  # thread, threads


def _floats(dimensions: int, *, readonly: bool = False) -> Type:
    return array_type(np.float32, dimensions, readonly=readonly)


def _integers(dimensions: int) -> Type:
    return array_type(np.int64, dimensions)


def _bytes(dimensions: int) -> Type:
    return array_type(np.uint8, dimensions)


def _named(of: Any, *fields: Type) -> Type:
    return of, *fields


def _vectors(bits: int, dimensions: int) -> Type:
    """Return the type of `VectorBuffers`: of one vector (1), or of several (2)."""
    integers = array_type(f"int{bits}", dimensions + 2)
    return tuple, _floats(dimensions), integers, array_type(np.int32, dimensions + 1), _floats(dimensions)


def _batch(bits: int) -> tuple[Type, ...]:
    """Return the types of a `Batch`'s integers, offsets and scales."""
    return array_type(f"int{bits}", 5), array_type(np.int32, 4), _floats(3)


_ROUTING = _named(router.Routing, _INTEGER, _INTEGER, _BOOLEAN, _FLOAT)
_EXPERTS = _named(
    experts.Experts,
    _ROUTING,
    _INTEGER,
    _floats(3),
    _floats(2),
    _floats(2),
    *[_integers(2)] * 3,
    _floats(4),
    *[_floats(3)] * 3,
    _BOOLEAN,
)
_DELTA_NET = _named(delta_net.DeltaNet, _INTEGER, _floats(3), _floats(3), *[_floats(2)] * 3)
_WEIGHTS = _named(
    decode.Weights, *[_integers(2)] * 3, _floats(3), *[_floats(2)] * 10, _floats(3), _DELTA_NET, _EXPERTS
)  # fmt: skip
_HEAD = _named(decode.OutputHead, _floats(1), _integers(1), _integers(1), _integers(1), _floats(2))
_SCRATCH = _named(attend_token.Scratch, _floats(3), _floats(3), _floats(5), _floats(4), _floats(4))
_OPTIONS = _named(
    layer_options.LayerOptions, _FLOAT, _FLOAT, _INTEGER, _BOOLEAN, _INTEGER, _BOOLEAN, _FLOAT, _FLOAT, _BOOLEAN,
    *[_integers(1)] * 3, _floats(2),
)  # fmt: skip
_SINGLE_BUFFERS = _named(
    decode.Buffers, _floats(2), _vectors(16, 2), _vectors(16, 2), *[_floats(1)] * 3, _integers(2),
    *[_floats(1)] * 3, _vectors(16, 2), _named(
        experts.ExpertBuffers, _floats(2), _floats(3), _integers(2), *[_floats(2)] * 3, _vectors(16, 2), _floats(2)
    ),
)  # fmt: skip
_KEY_VALUES = {
    cache: _named(
        kv_pages.KeyValues,
        _integers(2),
        array_type(dtype, 1),
        *[_INTEGER] * 3,
        _floats(3),
        _floats(3),
        _integers(1),
        _INTEGER,
        _INTEGER,
        _floats(3),
        _integers(1),
        _integers(2),
        _integers(2),
    )
    for cache, dtype in (("f16", np.uint16), ("f32", np.float32))
}


def _batch_buffers(bits: int) -> Type:
    vectors = _vectors(bits, 2)
    of_experts = _named(
        experts_batch.ExpertBatchBuffers, _floats(2), _floats(3), _integers(2), _floats(2), _integers(2), _integers(2),
        vectors, _floats(2), _floats(2), vectors, _floats(2),
    )  # fmt: skip
    return _named(
        decode_batch.BatchBuffers, _floats(2), _floats(2), vectors, vectors, *[_floats(2)] * 5, vectors, _floats(2),
        _floats(2), of_experts,
    )  # fmt: skip


Signatures = Mapping[Any, list[tuple[Type, ...]]]


def _encoding() -> Signatures:
    """Return the kernels of conversions, checks and exports."""
    stored = [_floats(2, readonly=True), array_type(np.uint16, 2, readonly=True)]
    levels = (_bytes(2), _bytes(2))
    moments = _named(refinement.SecondMoments, _floats(2), _floats(3), _floats(3))
    halves, entries = array_type(np.uint16, 3, readonly=True), array_type(np.uint32, 1)
    searched = (_floats(2), _floats(1), _BOOLEAN, _floats(1), _FLOAT)
    packers = (pack._pack_1, pack._pack_2, pack._pack_3, pack._pack_4)
    return {
        quantize.best_candidates: [(weights, _INTEGER, _FLOAT, _floats(2), *_SHARE) for weights in stored],
        quantize.round_to_codebook: [
            (weights, _INTEGER, _floats(2), _floats(1), _floats(1), _FLOAT, *levels, *_SHARE) for weights in stored
        ],
        search.best_scales: [(*searched, _floats(2), *_SHARE)],
        search.round_to_best: [(*searched, *levels, *_SHARE)],
        error_feedback.quantize_columns: [
            (_floats(2), _floats(2), _floats(1), _FLOAT, *levels, _floats(2), *_SHARE),
        ],
        refinement.refine_columns: [
            (_floats(2), moments, _INTEGER, _floats(1), _FLOAT, *levels, _floats(2), *_SHARE),
        ],
        recover.allowed_scales: [
            (array_type(np.int32, 2), _integers(2), _integers(2), _integers(1), _integers(2)),
        ],
        recover.find_misfits: [(halves, entries, _integers(2), *_SHARE)],
        recover.encode_halves: [(halves, entries, _bytes(2), _bytes(3), _bytes(2), array_type(np.int64, 3), *_SHARE)],
        **{packer: [(_bytes(3), _bytes(2), array_type(np.uint16, 2), *_SHARE)] for packer in packers},
        unpack._scale_rows: [(_bytes(2), _bytes(2), _floats(1), _INTEGER, _floats(2), *_SHARE)],
        check_words.first_damaged_row: [(array_type(np.uint16, 2), _INTEGER)],
        check_words.first_not_finite: [(array_type(bits, 1), _INTEGER) for bits in ("uint16", "uint32")],
    }


def _prompts(isa: Type) -> Signatures:
    """Return the kernels of prompts."""
    kept = (_floats(2), _floats(2), _floats(1), _FLOAT, _floats(1, readonly=True), _FLOAT, _floats(2))
    halves, sizes = array_type(np.uint16, 1, readonly=True), (_INTEGER, _INTEGER)
    return {
        gemm.trit_gemm: [
            (isa, halves, *sizes, _floats(1), *_batch(bits), _floats(2), _INTEGER, *_SHARE) for bits in (8, 16)
        ],
        gemm.half_gemm: [(isa, halves, _INTEGER, _floats(2), _floats(2), _INTEGER, *_SHARE)],
        activations.add_and_normalize_batch: [(*kept, *_batch(bits), *_SHARE) for bits in (8, 16)],
        activations.quantize_batch: [(_floats(2), *_batch(bits), *_SHARE) for bits in (8, 16)],
        activations.swiglu_batch: [
            (_floats(2), _INTEGER, _BOOLEAN, _floats(2), *_batch(bits), *_SHARE) for bits in (8, 16)
        ],
        activations.quantization_error_of_batch: [
            (_floats(2), array_type(np.int16, 5), _floats(3), _floats(2), *_SHARE),
        ],
        rotation.rotate_and_store: [
            (_floats(2), _floats(1), _floats(1), _OPTIONS, _INTEGER, kv, _INTEGER, _integers(1), _integers(1), *_SHARE)
            for kv in _KEY_VALUES.values()
        ],
        attention.attend: [
            (isa, _floats(2), _OPTIONS, _INTEGER, kv, _integers(2), _INTEGER, _floats(2), *_SHARE)
            for kv in _KEY_VALUES.values()
        ],
        short_convolution.convolve_tokens: [
            (_floats(2), kv, _INTEGER, _floats(2), _integers(1), _integers(1), _floats(2), *_SHARE)
            for kv in _KEY_VALUES.values()
        ],
        delta_net.prepare_tokens: [
            (isa, _DELTA_NET, kv, _INTEGER, *[_floats(2)] * 3, _integers(1), _integers(1), *_SHARE)
            for kv in _KEY_VALUES.values()
        ],
        delta_net.mix_tokens: [
            (
                isa,
                _DELTA_NET,
                _OPTIONS,
                kv,
                _INTEGER,
                _floats(2),
                _floats(2),
                _integers(1),
                _integers(1),
                _floats(2),
                *_SHARE,
            )
            for kv in _KEY_VALUES.values()
        ],
    }


def _prompts_of_mixtures(isa: Type) -> Signatures:
    """Return the kernels of prompts that only mixtures of experts need."""
    tokens, place = (_integers(2), _floats(2)), (_integers(1), _integers(1))
    halves = array_type(np.uint16, 1, readonly=True)
    return {
        experts_prompt.route_prompt: [
            (isa, _EXPERTS, _INTEGER, _floats(2), _floats(2), _floats(3), *tokens, *_SHARE),
        ],
        experts_prompt.expert_gemm: [
            (isa, halves, _INTEGER, _INTEGER, _floats(2), *place, *_batch(bits), _floats(2), _INTEGER, *_SHARE)
            for bits in (8, 16)
        ],
        experts_prompt.expert_half_gemm: [
            (isa, halves, _INTEGER, *place, _floats(2), _floats(2), _INTEGER, *_SHARE),
        ],
        experts_prompt.sum_experts_prompt: [
            (_EXPERTS, _floats(2), *tokens, _floats(2), _floats(2), _floats(2), *_SHARE),
        ],
        activations.quantize_gathered: [
            (_floats(2), _integers(1), _BOOLEAN, _floats(2), *_batch(bits), *_SHARE) for bits in (8, 16)
        ],
    }


def _any_strides(dtype: str, dimensions: int) -> Type:
    return np.dtype(dtype), dimensions, WRITABLE


def _shared(isa: Type) -> Signatures:
    """Return the kernels that those of generation and prompts call."""
    matrix, steps, share, row = (isa, _INTEGER), _floats(1), (_INTEGER, _INTEGER), _floats(1)
    out = {dimensions: _any_strides("float32", dimensions) for dimensions in (1, 2)}
    return {
        activations.quantize_row: [
            (row, _any_strides(f"int{bits}", 3), _any_strides("int32", 2), _any_strides("float32", 1))
            for bits in (16, 8)
        ],
        activations.add_and_normalize: [
            (row, row, row, _FLOAT, _floats(1, readonly=readonly), _FLOAT, row) for readonly in (False, True)
        ],
        swiglu.swiglu: [(row, row, _INTEGER, row)],
        swiglu.multiply_sigmoid: [(row, row, row)],
        attend_token.merge_splits: [(isa, _SCRATCH, _INTEGER, _OPTIONS, *[_INTEGER] * 3, row, _INTEGER)],
        gemv_batch.multiply_rows_batch: [
            (*matrix, _INTEGER, steps, _vectors(bits, 2), out[2], *share, _floats(1)) for bits in (16, 8)
        ],
        gemv_batch.multiply_half_rows: [(*matrix, _floats(2), out[2], *share, _floats(1))],
        gemv.multiply_rows: [(*matrix, _INTEGER, steps, _vectors(bits, 1), out[1], *share) for bits in (16, 8)],
    }


def _generation(isa: Type) -> Signatures:
    """Return the kernels of generated tokens."""
    matrices = (isa, _integers(1), _integers(1), _integers(1), _floats(2))
    f16, place = _KEY_VALUES["f16"], (_INTEGER, _INTEGER)
    return {
        decode.decode: [
            (isa, _WEIGHTS, _HEAD, f16, _SCRATCH, _SINGLE_BUFFERS, _OPTIONS, *place, _floats(1), _integers(1), *_SHARE)
        ],
        decode_batch.decode_batch: [
            (
                isa, _WEIGHTS, _floats(1), f16, _SCRATCH, _batch_buffers(bits), _OPTIONS,
                *[_integers(1)] * 3, *_SHARE,
            )
            for bits in (16, 8)
        ],
        gemv.gemv: [(*matrices, _vectors(16, 1), _floats(1), *_SHARE)],
        gemv_batch.gemv_batch: [(*matrices, _vectors(16, 2), _floats(2), _floats(2), *_SHARE)],
        activations.quantize_vectors: [(*_vectors(16, 2)[1:], *_SHARE)],
        attend_token.attend_units: [
            (
                isa, f16, _SCRATCH, _INTEGER, _INTEGER, *[_floats(1)] * 3, _OPTIONS, *[_INTEGER] * 4, _BOOLEAN,
                _INTEGER,
            ),
        ],
        attend_layers.attend_layers: [
            (
                isa, f16, _SCRATCH, _floats(1), _floats(1), _floats(2), _OPTIONS,
                _INTEGER, _floats(2), _integers(1), *_SHARE,
            ),
        ],
        delta_net.mix_layers: [
            (
                isa, _DELTA_NET, _OPTIONS, f16, *[_floats(1)] * 3, _integers(2), _INTEGER, _floats(2), _integers(1),
                *_SHARE,
            ),
        ],
        short_convolution.convolve_layers: [
            (_floats(3), _integers(1), f16, _floats(1), _INTEGER, _floats(1), *_SHARE),
        ],
    }  # fmt: skip


def _machine(isa: Type) -> Signatures:
    """Return the kernels that examine the machine."""
    outputs = (array_type(np.uint16, 2), array_type(np.int32, 2), array_type(np.int32, 2), _floats(1))
    rows = array_type(np.uint16, 2, readonly=True)
    return {
        self_test._run: [(isa, array_type(np.uint16, 1), array_type(np.uint16, 1), _bytes(1), _floats(1), *outputs)],
        unpack._unpack_rows: [(isa, rows, _INTEGER, _bytes(3), _bytes(2), *_SHARE)],
        bandwidth.read: [(_integers(1), _INTEGER, *_SHARE)],
        barrier.repeat_barrier: [(_integers(1), _INTEGER, *_SHARE)],
    }


def all_kernels(isa: tuple[int, ...]) -> Signatures:
    """Return each kernel and the argument types that it is needed with; `isa` is the instruction set."""
    isa_type = (tuple, *[_INTEGER] * len(isa))
    return {
        **_shared(isa_type),
        **_generation(isa_type),
        **_prompts(isa_type),
        **_prompts_of_mixtures(isa_type),
        **_encoding(),
        **_machine(isa_type),
    }

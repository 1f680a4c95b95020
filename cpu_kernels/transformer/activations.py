"""Operations on activations between two matrices: residual addition, norms, gated activations, quantization.

The trit kernels multiply int16 activations (int8 in prefill) with one scale per group of 16. Real models have
activations a thousand times the mean: a single scale per vector changes the logits by 0.1 %.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import cgutils, intrinsic, types
from cpu_kernels.packed_rows.layout import BLOCK_TOKENS, GROUP_SIZE, PAIRS, QUADS, level_offset
from cpu_kernels.simd.variants import PORTABLE
from cpu_kernels.simd.vectors import FLOAT, I32, I64, Vectors, vector
from cpu_kernels.transformer.swiglu import swiglu

# x, integers, offsets, scales: input of the matrix kernels; `quantize_row` and `quantize_batch` specify the layouts
VectorBuffers = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

_SMALLEST = 1e-30  # the reciprocal of a smaller number could overflow
_GROUPS_AT_ONCE = 64
_OFFSETS = tuple(-level_offset(depth) for depth in (1, 2, 3, 4))


@intrinsic
def _quantize(typing_context, x, integers, offsets, scales):
    """Emit the quantization of a vector.

    x: float32 [groups, 16]; integers: int16 [groups, 8, 2] or int8 [groups, 4, 4], out, the last axis contiguous;
    offsets: int32 [4, groups], out; scales: float32 [groups], out.
    """
    bits = integers.dtype.bitwidth
    lanes = [pair + k * PAIRS for pair in range(PAIRS) for k in range(2)]
    if bits == 8:
        lanes = [2 * quad + k % 2 + k // 2 * PAIRS for quad in range(QUADS) for k in range(4)]

    def generate(context, builder, signature, arguments):
        vectors = Vectors(builder, PORTABLE)
        names = ("x", "integers", "offsets", "scales")
        arrays = {
            name: context.make_array(type_)(context, builder, value)
            for name, type_, value in zip(names, signature.args, arguments, strict=True)
        }
        data = {name: builder.ptrtoint(array.data, I64) for name, array in arrays.items()}
        strides = {name: cgutils.unpack_tuple(builder, array.strides) for name, array in arrays.items()}

        def part(name: str, axis: int, index: ir.Value, base: ir.Value | None = None) -> ir.Value:
            return builder.add(base or data[name], builder.mul(index, strides[name][axis]))

        def every(function: str, value: ir.Value) -> ir.Value:
            return vectors.call(f"llvm.{function}.v{GROUP_SIZE}f32", value.type, value)

        groups = cgutils.unpack_tuple(builder, arrays["scales"].shape)[0]
        with cgutils.for_range(builder, groups) as loop:
            group = vectors.load(part("x", 0, loop.index), FLOAT, GROUP_SIZE)
            # The bits of magnitudes sort like the magnitudes, and NaN is the largest, so it is kept.
            magnitudes = builder.bitcast(every("fabs", group), vector(I32, GROUP_SIZE))
            largest = vectors.call(f"llvm.vector.reduce.umax.v{GROUP_SIZE}i32", I32, magnitudes)
            largest = builder.bitcast(largest, FLOAT)
            usable = builder.fcmp_unordered(">", largest, FLOAT(_SMALLEST))
            top = FLOAT(2 ** (bits - 1) - 1)
            inverse = builder.select(usable, builder.fdiv(top, largest), FLOAT(0.0))
            scale = builder.select(usable, builder.fdiv(largest, top), FLOAT(0.0))
            builder.store(scale, builder.inttoptr(part("scales", 0, loop.index), FLOAT.as_pointer()))
            steps = every("rint", builder.fmul(group, vectors.fill(inverse, GROUP_SIZE)))
            whole = builder.fptosi(steps, vector(I32, GROUP_SIZE))
            total = vectors.call(f"llvm.vector.reduce.add.v{GROUP_SIZE}i32", I32, whole)
            for row, offset in enumerate(_OFFSETS):
                address = part("offsets", 1, loop.index, part("offsets", 0, I64(row)))
                builder.store(builder.mul(total, I32(offset)), builder.inttoptr(address, I32.as_pointer()))
            narrow = builder.trunc(whole, vector(ir.IntType(bits), GROUP_SIZE))
            units = builder.bitcast(vectors.shuffle(narrow, lanes), vector(I32, GROUP_SIZE * bits // 32))
            for number in range(units.type.count):
                address = part("integers", 1, I64(number), part("integers", 0, loop.index))
                unit = builder.extract_element(units, I32(number))
                builder.store(unit, builder.inttoptr(address, I32.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(x, integers, offsets, scales), generate


@numba.njit(cache=True)
def _groups(x):
    """Return the whole groups of a vector, [groups, 16]; the input of a float16 matrix may have further columns."""
    return x[: len(x) // GROUP_SIZE * GROUP_SIZE].reshape(-1, GROUP_SIZE)


@intrinsic
def _groups_first(typing_context, integers):
    """Return integers [planes, groups, lanes] as [groups, planes, lanes], a view.

    Numba's `transpose` compares the axes as sets, which takes more code than quantizing.
    """
    turned = integers.copy(layout="A")

    def generate(context, builder, signature, arguments):
        source = context.make_array(integers)(context, builder, arguments[0])
        view = context.make_array(turned)(context, builder)
        for field in ("data", "meminfo", "parent", "itemsize", "nitems"):
            setattr(view, field, getattr(source, field))
        for field in ("shape", "strides"):
            planes, groups, lanes = cgutils.unpack_tuple(builder, getattr(source, field))
            setattr(view, field, cgutils.pack_array(builder, [groups, planes, lanes]))
        context.nrt.incref(builder, integers, arguments[0])  # the caller gives up a reference of what it gets
        return view._getvalue()

    return turned(integers), generate


@numba.njit(cache=True, nogil=True, shared=True, any_strides=("integers", "offsets", "scales"))
def quantize_row(x, integers, offsets, scales):
    """Quantize one vector.

    Args:
        x: float32 [columns].
        integers: int16 [8, groups, 2], out: plane j has elements j and j + 8 of every group; or int8 [4, groups, 4]:
            elements 2 j, 2 j + 1, 2 j + 8 and 2 j + 9.
        offsets: int32 [4, groups], out: -h * sum of the group's integers, for each depth.
        scales: float32 [groups], out: the value of one integer step.

    """
    _quantize(_groups(x), _groups_first(integers), offsets, scales)


@numba.njit(cache=True, nogil=True)
def quantize_vectors(x, integers, offsets, scales, thread, threads):
    """Quantize a thread's share of several vectors, float32 [vectors, columns], each as `quantize_row` does."""
    for v in range(len(x) * thread // threads, len(x) * (thread + 1) // threads):
        quantize_row(x[v], integers[v], offsets[v], scales[v])


@numba.njit(cache=True)
def _share(blocks, thread, threads):
    """Return a thread's blocks of a batch; whole blocks, so that no two threads write to the same cache line."""
    return range(blocks * thread // threads, blocks * (thread + 1) // threads)


@numba.njit(cache=True)
def _tokens(block, x):
    """Return the tokens of a block."""
    return range(block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, len(x)))


@numba.njit(cache=True)
def _quantize_part(t, some, groups, integers, offsets, scales):
    """Quantize some groups of token t into its lane of its block; `some` is a slice, groups: float32 [some, 16]."""
    block, lane = t // BLOCK_TOKENS, t % BLOCK_TOKENS
    _quantize(groups, integers[block, some, :, lane], offsets[block, :, some, lane], scales[block, some, lane])


@numba.njit(cache=True)
def _quantize_tokens(block, x, integers, offsets, scales):
    """Quantize the tokens of a block, some groups at a time: the output is interleaved and should stay in cache."""
    groups = scales.shape[1]
    for first in range(0, groups, _GROUPS_AT_ONCE):
        some = slice(first, min(first + _GROUPS_AT_ONCE, groups))
        for t in _tokens(block, x):
            _quantize_part(t, some, _groups(x[t])[some], integers, offsets, scales)


@numba.njit(cache=True, fastmath={"contract", "reassoc"})
def normalize_row(x, residual, weight, epsilon, out):
    """Add `residual` to `x` in place, then compute out = weight * x / rms(x); all float32 [columns]."""
    total = np.float32(0.0)
    for k in range(len(x)):
        x[k] += residual[k]
        total += x[k] * x[k]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(len(x)) + epsilon)
    for k in range(len(x)):
        out[k] = weight[k] * (x[k] * factor)


@numba.njit(cache=True, fastmath={"contract", "reassoc"})
def _layer_norm(x, residual, scale, weight, epsilon, out):
    """Add scale * `residual` to `x` in place, then compute the LayerNorm of `x`; see `add_and_normalize`."""
    columns = len(x)
    total = np.float32(0.0)
    for k in range(columns):
        x[k] += residual[k] * scale
        total += x[k]
    mean = total / np.float32(columns)
    total = np.float32(0.0)
    for k in range(columns):
        out[k] = x[k] - mean
        total += out[k] * out[k]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(columns) + epsilon)
    for k in range(columns):
        out[k] = weight[k] * (out[k] * factor) + weight[columns + k]


@numba.njit(cache=True, nogil=True, shared=True, fastmath={"contract", "reassoc"})
def add_and_normalize(x, residual, output_norm, scale, weight, epsilon, out):
    """Add a layer's output to the residual stream, then apply the stream's norm; all float32.

    Args:
        x: [columns], the residual stream; modified.
        residual: [columns], the layer's output.
        output_norm: [columns], weights of an RMS norm of the output; [0] for none.
        scale: factor of the output.
        weight: [columns], weights of the stream's RMS norm; [0] for none, then the stream is copied. [2 * columns],
            weights and biases of a LayerNorm; then `output_norm` has no effect.
        epsilon: of the norms.
        out: [columns], the normalized stream.

    """
    if len(weight) > len(x):
        _layer_norm(x, residual, scale, weight, epsilon, out)
        return
    if len(output_norm) == 0 and scale == 1 and len(weight) > 0:
        normalize_row(x, residual, weight, epsilon, out)
        return
    total = np.float32(0.0)
    for k in range(len(x)):
        total += residual[k] * residual[k]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(len(x)) + epsilon)
    for k in range(len(x)):
        output_factor = factor * output_norm[k] if len(output_norm) > 0 else np.float32(1.0)
        x[k] += residual[k] * output_factor * scale
    total = np.float32(0.0)
    for k in range(len(x)):
        total += x[k] * x[k]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(len(x)) + epsilon)
    for k in range(len(x)):
        out[k] = weight[k] * (x[k] * factor) if len(weight) > 0 else x[k]


@numba.njit(cache=True, nogil=True)
def quantize_batch(x, integers, offsets, scales, thread, threads):
    """Quantize a thread's share of a batch.

    Args:
        x: float32 [tokens, columns].
        integers: int16 [blocks, groups, 8, 6 tokens, 2], out: elements j and j + 8 of a group are neighbours; or int8
            [blocks, groups, 4, 6 tokens, 4]: elements 2 j, 2 j + 1, 2 j + 8 and 2 j + 9. A block is six tokens.
        offsets: int32 [blocks, 4, groups, 6 tokens], out: as in `quantize_row`.
        scales: float32 [blocks, groups, 6 tokens], out: as in `quantize_row`.
        thread, threads: which of how many shares of the tokens to compute.

    """
    for block in _share(len(scales), thread, threads):
        _quantize_tokens(block, x, integers, offsets, scales)


@numba.njit(cache=True, nogil=True)
def quantize_gathered(source, tokens, keep, x, integers, offsets, scales, thread, threads):
    """Quantize a thread's share of a batch whose vectors lie anywhere.

    Args:
        source: float32 [vectors, columns].
        tokens: int64 [tokens of the batch], which vector each token is; -1 for none: its lane is left as it is.
        keep: whether to copy the vectors to `x`.
        x, integers, offsets, scales: as in `quantize_batch`, all out.
        thread, threads: as in `quantize_batch`.

    """
    groups = scales.shape[1]
    for block in _share(len(scales), thread, threads):
        for first in range(0, groups, _GROUPS_AT_ONCE):
            some = slice(first, min(first + _GROUPS_AT_ONCE, groups))
            for t in _tokens(block, tokens):
                if tokens[t] >= 0:
                    _quantize_part(t, some, _groups(source[tokens[t]])[some], integers, offsets, scales)
        if keep:
            for t in _tokens(block, tokens):
                if tokens[t] >= 0:
                    x[t] = source[tokens[t]]


@numba.njit(cache=True, nogil=True)
def quantization_error_of_batch(x, integers, scales, out, thread, threads):
    """Compute the quantization error of a thread's share of a batch: out = x - quantized x.

    Args:
        x, integers, scales: as in `quantize_batch`, already quantized.
        out: float32 [tokens, columns].
        thread, threads: as in `quantize_batch`.

    """
    for block in _share(len(scales), thread, threads):
        for t in _tokens(block, x):
            lane = t % BLOCK_TOKENS
            for g in range(scales.shape[1]):
                # In float64 the product is exact, so only the difference is rounded.
                scale = np.float64(scales[block, g, lane])
                for p in range(GROUP_SIZE):
                    k = g * GROUP_SIZE + p
                    out[t, k] = x[t, k] - scale * integers[block, g, p % PAIRS, lane, p // PAIRS]


@numba.njit(cache=True, nogil=True)
def add_and_normalize_batch(
    stream, residual, output_norm, scale, weight, epsilon, x, integers, offsets, scales, thread, threads
):
    """Add a layer's output, normalize and quantize a thread's share of a batch; see `add_and_normalize`.

    Args:
        stream: float32 [tokens, columns], the residual stream; modified.
        residual: float32 [tokens, columns], the layer's output.
        output_norm, scale, weight, epsilon: as in `add_and_normalize`.
        x, integers, offsets, scales: as in `quantize_batch`, all out.
        thread, threads: as in `quantize_batch`.

    """
    for block in _share(len(scales), thread, threads):
        for t in _tokens(block, x):
            add_and_normalize(stream[t], residual[t], output_norm, scale, weight, epsilon, x[t])
        _quantize_tokens(block, x, integers, offsets, scales)


@numba.njit(cache=True, nogil=True)
def swiglu_batch(gate_up, activation, keep, x, integers, offsets, scales, thread, threads):
    """Compute a gated activation and quantize the result: a thread's share of a batch.

    Args:
        gate_up: float32 [tokens, 2 * columns], gate first.
        activation: as in `swiglu`.
        keep: whether to write `x`, which takes as much memory as all the rest and is not read by packed matrices. If
            false, columns must be a multiple of 16.
        x, integers, offsets, scales: as in `quantize_batch`, all out.
        thread, threads: as in `quantize_batch`.

    """
    columns, groups = x.shape[1], scales.shape[1]
    gated = np.empty(_GROUPS_AT_ONCE * GROUP_SIZE, np.float32)
    for block in _share(len(scales), thread, threads):
        if keep:
            for t in _tokens(block, x):
                swiglu(gate_up[t, :columns], gate_up[t, columns:], activation, x[t])
            _quantize_tokens(block, x, integers, offsets, scales)
            continue
        for first in range(0, groups, _GROUPS_AT_ONCE):
            some = slice(first, min(first + _GROUPS_AT_ONCE, groups))
            start, end = some.start * GROUP_SIZE, some.stop * GROUP_SIZE
            for t in _tokens(block, x):
                part = gated[: end - start]
                swiglu(gate_up[t, start:end], gate_up[t, columns + start : columns + end], activation, part)
                _quantize_part(t, some, _groups(part), integers, offsets, scales)

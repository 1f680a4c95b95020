"""Short convolutions: layers whose tokens see the few positions before them, channel by channel.

A layer's input matrix gives three vectors of a token: an input gate, an output gate and values. The gated values, here
the inputs, are convolved along the positions, and the result is multiplied with the output gate. The inputs of the last
positions, which are all that a sequence needs in order to go on, lie in its pages (`kv_pages`).
"""

from __future__ import annotations

from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.compilation.lazy_numba import intrinsic, types
from cpu_kernels.simd.vectors import FLOAT
from cpu_kernels.transformer.kv_pages import PAGE, RECENT
from cpu_kernels.transformer.layer_options import SHORT_CONVOLUTION

FLOAT_BYTES = 4


@intrinsic
def _load(typing_context, address):
    """Emit the load of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], FLOAT.as_pointer()))

    return types.float32(types.intp), generate


@intrinsic
def _store(typing_context, address, value):
    """Emit the store of a float32."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], builder.inttoptr(arguments[0], FLOAT.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), generate


@numba.njit(cache=True)
def _inputs_address(kv, sequence, layer, position):
    """Return the address of a position's inputs."""
    place = kv.slots[layer] * RECENT + position % RECENT
    return kv.table[sequence, position // PAGE] + kv.recent_start + place * kv.recent_width * FLOAT_BYTES


@numba.njit(cache=True)
def convolve_token(kernel, kv, layer, projected, sequence, position, out, first, last):
    """Compute channels `first` to before `last` of one token.

    Args:
        kernel: float32 [taps, width]; row n is multiplied with the inputs n positions before.
        kv: see `KeyValues`; the inputs of the taps - 1 positions before must be stored.
        layer: index of the layer.
        projected: float32 [3 * width], the product with the layer's input matrix: input gates, output gates, values.
        sequence, position: the token's sequence and position.
        out: float32 [width], out.
        first, last: the channels to compute.

    """
    width = len(out)
    for k in range(first, last):
        out[k] = kernel[0, k] * (projected[k] * projected[2 * width + k])
    for tap in range(1, min(len(kernel), position + 1)):
        inputs = _inputs_address(kv, sequence, layer, position - tap)
        for k in range(first, last):
            out[k] += kernel[tap, k] * _load(inputs + k * FLOAT_BYTES)
    for k in range(first, last):
        out[k] *= projected[width + k]


@numba.njit(cache=True)
def store_inputs(kv, layer, projected, sequence, position, first, last):
    """Store the inputs of channels `first` to before `last` of one token; arguments as in `convolve_token`."""
    inputs = _inputs_address(kv, sequence, layer, position)
    for k in range(first, last):
        _store(inputs + k * FLOAT_BYTES, projected[k] * projected[2 * kv.recent_width + k])


@numba.njit(cache=True, nogil=True)
def convolve_tokens(kernel, kv, layer, projected, sequences, positions, out, thread, threads):
    """Compute a thread's share of the channels of several tokens, and store their inputs.

    Args:
        kernel, kv, layer: as in `convolve_token`.
        projected: float32 [tokens, 3 * width].
        sequences, positions: int64 [tokens]; the tokens of a sequence come in the order of their positions.
        out: float32 [tokens, width], out.
        thread, threads: index of this thread, and number of threads.

    """
    width = out.shape[1]
    first, last = width * thread // threads, width * (thread + 1) // threads
    for t in range(len(out)):
        convolve_token(kernel, kv, layer, projected[t], sequences[t], positions[t], out[t], first, last)
        store_inputs(kv, layer, projected[t], sequences[t], positions[t], first, last)


@numba.njit(cache=True, nogil=True)
def convolve_layers(kernels, kinds, kv, projected, position, out, thread, threads):
    """Compute one token's convolutions in all layers that have one, without the matrices, as decode does.

    `bench` measures their share of decode with it. The first thread computes; in decode every thread does.

    Args:
        kernels: float32 [layers, taps, width].
        kinds: int64 [layers], see `LayerOptions`.
        kv: see `KeyValues`; the token is of sequence 0.
        projected, position: as in `convolve_token`; `projected` is the same in every layer.
        out: float32 [width]: the last layer's result.
        thread, threads: index of this thread, and number of threads.

    """
    if thread == 0:
        for layer in range(len(kinds)):
            if kinds[layer] == SHORT_CONVOLUTION:
                convolve_token(kernels[layer], kv, layer, projected, 0, position, out, 0, len(out))
                store_inputs(kv, layer, projected, 0, position, 0, len(out))

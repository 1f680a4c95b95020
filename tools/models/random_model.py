"""A stock F16 GGUF file with random weights in the shape of a known model, for measurements of time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np

from tritgguf.architectures.delta_net import DELTA_DECAY, DeltaNet
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.architectures.experts import COUNT_KEY, SHARED_WIDTH_KEY, USED_KEY, WIDTH_KEY, Experts
from tritgguf.architectures.short_convolutions import ShortConvolutions
from tritgguf.architectures.table import GGUF_ARCHITECTURES
from tritgguf.architectures.tensor_names import kept_in_float32

QKV = frozenset({"attn_q", "attn_k", "attn_v"})


def delta_net(layers: int, value_heads: int) -> DeltaNet:
    """Return the layers with a state of a Qwen3.5 with so many layers: all but every fourth."""
    with_state = frozenset(layer for layer in range(layers) if (layer + 1) % 4)
    return DeltaNet(with_state, taps=4, key_heads=16, value_heads=value_heads, key_dim=128, value_dim=128)


# Architecture and sizes. Output head and embeddings are separate, so that we and llama.cpp read an F16 head.
SHAPES = {
    "qwen2.5-1.5b": (
        "qwen2",
        Dimensions(
            layers=28, vocabulary=151936, hidden=1536, feed_forward=8960, heads=12, kv_heads=2, head_dim=128, biased=QKV
        ),
    ),
    "qwen3-30b-a3b": (
        "qwen3moe",
        Dimensions(
            layers=48,
            vocabulary=151936,
            hidden=2048,
            feed_forward=6144,
            heads=32,
            kv_heads=4,
            head_dim=128,
            architecture="qwen3moe",
            experts=Experts(count=128, used=8, width=768, normalizes=True),
        ),
    ),
    "gpt-oss-20b": (
        "gpt-oss",
        Dimensions(
            layers=24,
            vocabulary=201088,
            hidden=2880,
            feed_forward=2880,
            heads=64,
            kv_heads=8,
            head_dim=64,
            biased=GGUF_ARCHITECTURES["gpt-oss"].biased,
            architecture="gpt-oss",
            experts=Experts(count=32, used=4, width=2880),
        ),
    ),
    "lfm2-1.2b": (
        "lfm2",
        Dimensions(
            layers=16,
            vocabulary=65536,
            hidden=2048,
            feed_forward=8192,
            heads=32,
            kv_heads=8,
            head_dim=64,
            architecture="lfm2",
            convolutions=ShortConvolutions(frozenset(range(16)) - {2, 5, 8, 10, 12, 14}, taps=3),
        ),
    ),
    "qwen3.5-0.8b": (
        "qwen35",
        Dimensions(
            layers=24,
            vocabulary=248320,
            hidden=1024,
            feed_forward=3584,
            heads=8,
            kv_heads=2,
            head_dim=256,
            architecture="qwen35",
            delta_net=delta_net(24, value_heads=16),
            rotated_dim=64,
        ),
    ),
    "qwen3.5-35b-a3b": (
        "qwen35moe",
        Dimensions(
            layers=40,
            vocabulary=248320,
            hidden=2048,
            feed_forward=512,
            heads=16,
            kv_heads=2,
            head_dim=256,
            architecture="qwen35moe",
            experts=Experts(count=256, used=8, width=512, shared_width=512, has_shared_router=True, normalizes=True),
            delta_net=delta_net(40, value_heads=32),
            rotated_dim=64,
        ),
    ),
    "smollm2-135m": (
        "llama",
        Dimensions(layers=30, vocabulary=49152, hidden=576, feed_forward=1536, heads=9, kv_heads=3, head_dim=64),
    ),
}
_PRE_TOKENIZERS = {
    "qwen2": "qwen2",
    "qwen3moe": "qwen2",
    "gpt-oss": "gpt-4o",
    "lfm2": "lfm2",
    "qwen35": "qwen35",
    "qwen35moe": "qwen35",
    "llama": "smollm",
}
_SLIDING_WINDOWS = {"gpt-oss": 128}
_CONTEXT = 32768
_ROWS_AT_ONCE = 1 << 24  # weights drawn at once


def with_layers(sizes: Dimensions, layers: int) -> Dimensions:
    """Return a model's shape with fewer layers."""
    if sizes.delta_net is not None:
        sizes = dataclasses.replace(sizes, delta_net=delta_net(layers, sizes.delta_net.value_heads))
    return dataclasses.replace(sizes, layers=layers)


# Two files of the whole mixture would not fit the memory, as comparing them takes.
SHAPES["qwen3-30b-a3b-half"] = (SHAPES["qwen3-30b-a3b"][0], with_layers(SHAPES["qwen3-30b-a3b"][1], 24))


def write_random_model(path: Path, architecture: str, sizes: Dimensions, seed: int = 0) -> None:
    """Write the file; it appears when it is complete. The same seed gives the same bytes."""
    partial = path.with_name(path.name + ".partial")
    shapes = sizes.shapes()
    writer = gguf.GGUFWriter(partial, architecture)
    add_metadata(writer, architecture, sizes)
    for name, shape in shapes.items():
        dtype = np.dtype(np.float32 if len(shape) == 1 or kept_in_float32(name) else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_weights(writer, shapes, np.random.default_rng(seed))
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_weights(
    writer: gguf.GGUFWriter, shapes: Mapping[str, tuple[int, ...]], generator: np.random.Generator
) -> None:
    """Write Gaussian matrices, scaled so that activations stay near 1, and vectors, see `vector_value`."""
    for name, shape in shapes.items():
        writer.write_tensor_data(np.concatenate(list(random_rows(name, shape, generator))).reshape(shape))


def random_rows(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the rows of a random tensor, of the type that an F16 file has it in, a part at a time."""
    if len(shape) == 1:
        yield np.full((1, *shape), vector_value(name), np.float32)
        return
    rows, step = math.prod(shape[:-1]), max(1, _ROWS_AT_ONCE // shape[-1])
    for first in range(0, rows, step):
        part = generator.standard_normal((min(step, rows - first), shape[-1]), np.float32)
        part *= np.float32(shape[-1] ** -0.5)
        yield part if kept_in_float32(name) else part.astype(np.float16)


def vector_value(name: str) -> float:
    """Return what all elements of a vector are: ones of norms, zeros of biases, -1 of a state's decays."""
    if name.endswith(f".{DELTA_DECAY}"):
        return -1.0
    return 0.0 if name.endswith("bias") else 1.0


def add_metadata(writer: gguf.GGUFWriter, architecture: str, sizes: Dimensions) -> None:
    """Add the keys of a model of these sizes, with a tokenizer of bytes."""
    writer.add_name("random")
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.feed_forward)
    writer.add_head_count(sizes.heads)
    if sizes.convolutions is None:
        writer.add_head_count_kv(sizes.kv_heads)
    else:
        writer.add_head_count_kv([0 if sizes.convolves(layer) else sizes.kv_heads for layer in range(sizes.layers)])
        writer.add_shortconv_l_cache(sizes.convolutions.taps)
    if sizes.head_dim * sizes.heads != sizes.hidden:
        writer.add_key_length(sizes.head_dim)
        writer.add_value_length(sizes.head_dim)
    if sizes.experts is not None:
        keys = {COUNT_KEY: sizes.experts.count, USED_KEY: sizes.experts.used, WIDTH_KEY: sizes.experts.width}
        if sizes.experts.shared_width:
            keys[SHARED_WIDTH_KEY] = sizes.experts.shared_width
        for key, number in keys.items():
            writer.add_uint32(f"{architecture}.{key}", number)
    if sizes.delta_net is not None:
        _add_state_keys(writer, sizes, sizes.delta_net)
    if architecture in _SLIDING_WINDOWS:
        writer.add_sliding_window(_SLIDING_WINDOWS[architecture])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(sizes.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    tokens, types = byte_tokens(sizes.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_TOKENIZERS[architecture])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["\u0120 t"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)


def _add_state_keys(writer: gguf.GGUFWriter, sizes: Dimensions, states: DeltaNet) -> None:
    writer.add_ssm_conv_kernel(states.taps)
    writer.add_ssm_state_size(states.key_dim)
    writer.add_ssm_group_count(states.key_heads)
    writer.add_ssm_time_step_rank(states.value_heads)
    writer.add_ssm_inner_size(states.values)
    writer.add_full_attention_interval(4)
    writer.add_rope_dimension_count(sizes.rotated_dim or sizes.head_dim)
    writer.add_rope_dimension_sections([11, 11, 10, 0])


def byte_tokens(vocabulary: int) -> tuple[list[str], list[int]]:
    """Return a byte-level vocabulary of this length and its token types.

    The 256 bytes as GPT-2 writes them (https://github.com/openai/gpt-2/blob/master/src/encoder.py), one merge, fillers
    and an end-of-text token. Programs that load the file require all of these.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    tokens = [*map(chr, printable), *(chr(256 + number) for number in range(len(others))), "\u0120t"]
    types = [int(gguf.TokenType.NORMAL)] * len(tokens)
    fillers = vocabulary - len(tokens) - 1
    tokens += [*(f"<unused{number}>" for number in range(fillers)), "<|endoftext|>"]
    types += [*[int(gguf.TokenType.UNUSED)] * fillers, int(gguf.TokenType.CONTROL)]
    return tokens, types
